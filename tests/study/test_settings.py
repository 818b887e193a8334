"""A study's file: what is read, and what is refused in one sentence that says where."""

import copy

import pytest
from study.conftest import CONTENT

from slope_megatron.config.yaml_file import write_yaml
from slope_megatron.study.settings import BestOf, Narrow, read_study


def test_it_is_read(study_of):
    study = study_of()
    assert study.name == "study"
    assert study.groups["sweep"].lr == (1e-3, 2e-3, 4e-3) and study.groups["sweep"].seeds == (1,)
    assert study.groups["ladder"].lr == BestOf(best_of="sweep", exponent=-0.5)
    assert study.methods["narrow"].narrow == Narrow(to="flops", of="static", speedup="whole")
    assert (study.tuned_as("adapted"), study.timed_as("adapted"), study.sized_as("adapted")) == (
        "static",
        "static",
        "adapted",
    )
    assert (study.tuned_as("static"), study.timed_as("static")) == ("static", "static")


def test_two_methods_may_be_as_fast(study_of):
    assert study_of(speedups={"whole": {"static": 1.2, "dense": 1.2}}).speedups == {
        "whole": {"static": 1.2, "dense": 1.2}
    }


# (path of keys, new value or ... to delete it, what is said)
BAD = [
    (["groups"], ..., "has no groups: add it"),
    (["grups"], {}, "unknown key 'grups': did you mean groups?"),
    (["base", "model", "hiden_size"], 4, "base: unknown key model.hiden_size: did you mean hidden_size?"),
    (["sizes", "s", "seq_length"], 4, "sizes.s: unknown key model.seq_length"),
    (["sizes", "a b"], {}, "sizes names 'a b': names are letters"),
    (["methods", "static"], 3, "methods.static holds 3: it must map names to values"),
    (["methods", "static"], {"like": "none"}, "methods.static.like names 'none', which is not there"),
    (["methods", "narrow", "narrow", "to"], "bytes", "narrow.to is 'bytes': it must be one of flops, state_bytes"),
    (["methods", "narrow", "narrow", "speedup"], ..., "`to: flops` needs a `speedup`"),
    (["methods", "narrow", "narrow", "of"], "narrow", "narrow.of is itself narrowed"),
    (["speedups", "whole"], {}, "methods.narrow.narrow.of names 'static', which is not there"),
    (["groups", "sweep", "lr"], [1e-3, -1.0], "groups.sweep.lr holds -1.0: it must be a positive number"),
    (["groups", "sweep", "lr"], [], "groups.sweep.lr is []: it must be a list with an entry"),
    (["groups", "sweep", "seeds"], [1, 1], "groups.sweep.seeds is [1, 1]"),
    (["groups", "sweep", "seeds"], ["one"], "seeds are whole numbers"),
    (["groups", "sweep", "methods"], ["dense", "magic"], "groups.sweep.methods names 'magic', which is not there"),
    (["groups", "sweep", "methods"], ["dense"], "takes the best lr of group sweep, which does not sweep static"),
    (["groups", "ladder", "lr", "best_of"], "ladder", "best_of is 'ladder': it must be a group of one size"),
    (["groups", "sweep", "more_lr"], {"narrow": [1e-3]}, "groups.sweep.more_lr names 'narrow', which is not there"),
    (["groups", "ladder", "more_lr"], {"dense": [1e-3]}, "groups.ladder.more_lr goes with a list of lr alone"),
    (["groups"], {}, "groups names none: add one"),
    (["groups", "ladder", "lr"], {"best_of": ["sweep"]}, "best_of is ['sweep']: it must be a group of one size"),
    (["groups", "ladder", "lr", "exponent"], "x", "groups.ladder.lr.exponent holds 'x': it must be a number"),
    (["groups", "ladder", "sizes"], [["s"]], "groups.ladder.sizes names ['s'], which is not there"),
    (["groups", "ladder", "tokens_per_parameter"], "x", "tokens_per_parameter holds 'x': it must be a positive number"),
    (["methods", "adapted", "like"], ["static"], "methods.adapted.like names ['static'], which is not there"),
    (["methods", "narrow", "narrow", "of"], 3, "methods.narrow.narrow.of names 3, which is not there"),
    (["speedups", "whole", "static"], -1, "speedups.whole.static holds -1: it must be a positive number"),
    (["groups", "sweep", "lr"], [float("inf")], "groups.sweep.lr holds inf: it must be a positive number"),
    (["corpus", "vocabsize"], 3, "corpus: unknown key 'vocabsize': did you mean vocab_size?"),
]


@pytest.mark.parametrize(("keys", "value", "said"), BAD, ids=[".".join(keys) + said[-20:] for keys, _, said in BAD])
def test_what_is_wrong_is_said_with_its_place(tmp_path, keys, value, said):
    content = copy.deepcopy(CONTENT)
    part = content
    for key in keys[:-1]:
        part = part[key]
    if value is ...:
        del part[keys[-1]]
    else:
        part[keys[-1]] = value
    path = tmp_path / "study.yaml"
    write_yaml(path, content)
    with pytest.raises(ValueError) as refusal:
        read_study(path)
    assert said in str(refusal.value) and str(path) in str(refusal.value)
