"""Configuration: YAML plus `key=value` overrides in, frozen pydantic models out, and every mistake explained.

Configs live next to the class that they configure (`rlorch.specs`, the recipes); this package only reads them.

* A file is YAML 1.2 scalars: `1e-4` is a number, `no` is a word. No environment variables, no includes: the file and
  the command line are the whole input.
* An override is `dotted.key=value`; the value is YAML, a list item is named by its index (`rewards.terms.0.weight=2`).
  Later ones win.
* A section that is given in part keeps the rest of the *default section*, not only of the defaults of its class.
* All problems are reported at once, each with its place, key, value and what is allowed.
"""

from rlorch.config.changes import Change, check_resumable, config_digest, diff_configs, flatten
from rlorch.config.describe import FieldDoc, describe, field_docs
from rlorch.config.document import dump_yaml
from rlorch.config.load import dump_config, load_config

__all__ = [
    "Change",
    "FieldDoc",
    "check_resumable",
    "config_digest",
    "describe",
    "diff_configs",
    "dump_config",
    "dump_yaml",
    "field_docs",
    "flatten",
    "load_config",
]
