"""Rules that every test lives under."""

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is not a bug: properties are bounded by the number of examples, never by wall time.
settings.register_profile("rlorch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("rlorch")


@pytest.fixture(autouse=True)
def no_ray_outside_its_tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray.init` raises unless the test is marked ray or e2e: unit tests stay unit tests."""
    if request.node.get_closest_marker("ray") or request.node.get_closest_marker("e2e"):
        return
    import sys

    if "ray" in sys.modules:

        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("this test is not marked ray")

        monkeypatch.setattr(sys.modules["ray"], "init", refuse)
