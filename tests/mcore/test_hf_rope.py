"""Accounting for rope fields: what Transformers reads passes, everything else is named.

That what passes gives Transformers' own frequencies is `test_rope.py`'s to show.
"""

import pytest

from megatron_idpo.mcore.rope.hf_config import rope_problems

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

ACCEPTED = {
    "nothing": {},
    "theta": {"rope_theta": 500000.0},
    "null-scaling": {"rope_theta": 1e4, "rope_scaling": None},
    "old-spelling": {"rope_scaling": {"type": "linear", "factor": 2.0}},
    "new-spelling": {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}},
    "both-alike": {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    },
}

REFUSED = {
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.type"),
    "mrope": ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "rope_scaling.type"),
    "unknown-type": ({"rope_scaling": {"rope_type": "spiral"}}, "rope_scaling.rope_type"),
    "no-object": ({"rope_scaling": "linear"}, "rope_scaling"),
    "unread": (
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}},
        "rope_scaling.beta_fast",
    ),
    "missing": (
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}},
        "rope_scaling.low_freq_factor",
    ),
    "two-types": (
        {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
        "rope_scaling.rope_type",
    ),
    "contradiction": (
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
        "rope_scaling",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_transformers_reads_passes(name):
    config = {"max_position_embeddings": 32768, "head_dim": 64} | ACCEPTED[name]
    assert rope_problems(config, location="config.json") == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_ignored_or_misread_is_named(name):
    config, field = REFUSED[name]
    found = rope_problems({"max_position_embeddings": 32768} | config, location="config.json")
    assert [problem.location for problem in found] == [f"config.json: {field}"]
    assert all(problem.message for problem in found)


def test_all_mistakes_are_told_at_once():
    scaling = {"rope_type": "llama3", "surplus": 1}
    found = rope_problems({"rope_scaling": scaling}, location="here")
    locations = {problem.location for problem in found}
    assert locations == {
        "here: rope_scaling.factor",
        "here: rope_scaling.low_freq_factor",
        "here: rope_scaling.high_freq_factor",
        "here: rope_scaling.surplus",
    }
