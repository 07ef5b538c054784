"""The catalogue: shapes by name."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path

from rlorch.errors import ConfigError
from rlorch.placement import Devices
from rlorch.shapes.fit import misfits
from rlorch.shapes.load import read_shapes
from rlorch.shapes.names import ShapeRef, parse_ref
from rlorch.shapes.shape import DeploymentShape, TrainerMode, TrainingShape, TrainingShapeProfile


class Catalogue:
    """Shapes by name. Frozen after it was made; `load` makes the one that everybody uses."""

    def __init__(self, shapes: Iterable[TrainingShape]) -> None:
        by_name = {shape.name: shape for shape in shapes}
        families: dict[str, dict[TrainerMode, str]] = {}
        for shape in by_name.values():
            families.setdefault(shape.family, {})[shape.trainer_mode] = shape.name
        self._shapes: Mapping[str, TrainingShape] = {
            name: replace(shape, siblings=families[shape.family]) for name, shape in by_name.items()
        }

    @classmethod
    def load(cls, *extra_files: str | Path) -> "Catalogue":
        """The built-in shapes, those of the files in RLORCH_SHAPES, and those of `extra_files`, in that order.

        Raises:
            ConfigError: a file is wrong, with every line of it that is; or it gives a name that is taken.
        """
        return cls(read_shapes(extra_files))

    def list(self) -> tuple[TrainingShape, ...]:
        """Every shape, in the order of the files."""
        return tuple(self._shapes.values())

    def get(self, ref: str) -> TrainingShape:
        """The shape that a bare or full name means, whatever its account.

        Raises:
            ConfigError: no such name, with the nearest known ones; or a version that is not the shape's.
        """
        named = parse_ref(ref)
        shape = self._shapes.get(named.name)
        if shape is None:
            raise ConfigError(f"there is no training shape {named.name!r}; {self._nearest(named.name)}")
        _check_version("training", named, shape.version)
        return shape

    def resolve(self, ref: str) -> TrainingShapeProfile:
        """The profile of a shape, under the account that `ref` names. Raises as `get` does."""
        return self.get(ref).profile(parse_ref(ref).account)

    def deployment(self, ref: str) -> DeploymentShape:
        """A deployment shape by its bare or full name.

        Raises:
            ConfigError: no such name, with the nearest known ones; or a version that is not the shape's.
        """
        named = parse_ref(ref, "deploymentShapes")
        known = {shape.deployment.name: shape.deployment for shape in self.list() if shape.deployment}
        if named.name not in known:
            near = get_close_matches(named.name, known, 3, cutoff=0.0)
            raise ConfigError(f"there is no deployment shape {named.name!r}; near it are {', '.join(near)}")
        _check_version("deployment", named, known[named.name].version)
        return known[named.name]

    def fits(self, shape: TrainingShape, devices: Devices, *, with_deployment: bool = False) -> tuple[str, ...]:
        """Why the shape's trainer (and one replica of its deployment) cannot be placed on `devices`; empty: it can."""
        return misfits(shape, devices, with_deployment=with_deployment)

    def _nearest(self, name: str) -> str:
        near = get_close_matches(name, self._shapes, 3, cutoff=0.5)
        if near:
            return f"did you mean {' or '.join(near)}?"
        return "`rlorch shapes` lists what there is; your own come from --catalogue or RLORCH_SHAPES"


def _check_version(kind: str, named: ShapeRef, version: str) -> None:
    if named.version not in (None, version):
        raise ConfigError(
            f"{kind} shape {named.name} has no version {named.version!r}: versions are hashes of what a shape says, "
            f"and this catalogue's is {version}; leave the version out to take it"
        )
