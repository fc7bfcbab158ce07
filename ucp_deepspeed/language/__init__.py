"""The language: spec files give for each parameter name of a model family the pattern that it follows."""

from ucp_deepspeed.language.families import find_family, load_spec, naming_specs, spec_names
from ucp_deepspeed.language.resolve import per_rank, resolve_patterns
from ucp_deepspeed.language.schemes import logical_names, names_in_scheme
from ucp_deepspeed.language.spec import PATTERN, Match, Spec

__all__ = [
    "PATTERN",
    "Match",
    "Spec",
    "find_family",
    "load_spec",
    "logical_names",
    "names_in_scheme",
    "naming_specs",
    "per_rank",
    "resolve_patterns",
    "spec_names",
]
