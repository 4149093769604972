"""Wrong parameter files, made from params.yaml place by place: each ends in one sentence with the file and the place, or is listed below as right."""
import copy
import re
import signal
from collections import Counter

import pytest
import yaml

from irnb import pipeline
from tests.notebooks import ROOT

KEPT = ("supervised", "dil_sf", "spn_random", "source_only", "noise_da", "rcl", "rcl_k2")  # strategies, so that a file takes a second
LISTS = ("negatives",)  # whose items are changed too
VALUES = {"null": None, "text": "x", "number as text": "1e-3", "empty text": "", "list": [1], "empty list": [], "mapping": {"a": 1}, "negative": -1, "zero": 0, "huge": 10**12,
          "fraction": .5, "nan": float("nan"), "infinite": float("inf"), "true": True}
STAGE = {"corpus": "synthesize", "patches": "synthesize", "benchmark": "synthesize", "run": "synthesize", "network": "sources", "train": "sources", "strategies": "sources"}  # others: results

# What is right, with the reason; (place, change) as patterns.
ENTRY, OPTION = r"strategies\.\w+\.", r"strategies\.\w+\.options\."
RIGHT = [
    (r"corpus\.unpaired", "null|missing|empty list", "every second scene is the target domain then; an empty list is refused by the stage if a task needs one"),
    (r"corpus\.directory|experiment", "text|number as text", "a name like another"),
    (r"run\.tasks|run\.strategies", "empty list", "the second matrix is there"),
    (r"run\.(more|pretrain)(\.\w+)?|evaluation\.tuned", "empty list", "none of it"),
    (r"run\.seeds", "list", "another seed"),
    (r"evaluation\.tuned", "null|missing", "none of it"),
    (r"benchmark\.crop", "null", "whole pictures"),
    (r"benchmark\.seed|train\.(warmup|validate_every|ema)|{ENTRY}train\.(warmup|recalibrate)|{OPTION}(start|warmup)", "zero", "the first seed; none of it"),
    (r"({ENTRY})?train\.(steps|log_every|validate_every|checkpoint_every|warmup)", "huge", "as long as the user will wait"),
    (r"({ENTRY})?train\.\w+", "missing", "the default of TrainConfig"),
    (r"({ENTRY})?train\.(lr|ema)", "fraction", "a number like another"),
    (r"{ENTRY}train\.clip", "null|fraction|huge", "no clipping, or another bound"),
    (r"network\.preset", "null|missing", "the constructor's defaults"),
    (r"{ENTRY}(options|train|labels|network|start)", "missing|null", "the common sections, and the constructor's defaults"),
    (r"{OPTION}[\w.]+", "missing|null", "the constructor's default"),
    (r"{OPTION}(alpha|rho|negatives\.0\.(interval|decay))", "fraction", "a number like another"),
    (r"{OPTION}(warmup|length|alpha|schedule|negatives\.0\.interval)", "huge", "the term stays out for the whole training, or the step is as asked"),
    (r"{OPTION}negatives\.0\.decay|{OPTION}(rho|alpha)", "zero", "the past does not count; no weight; no step"),
    (r"{OPTION}negatives", "empty list", "no negatives, the plain loss"),
]
RIGHT = [(place.replace("{ENTRY}", ENTRY).replace("{OPTION}", OPTION), change, reason) for place, change, reason in RIGHT]


def places(value, path=()):
    "Every name in the file, as the path to it."
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) and path and path[-1] in LISTS else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def base():
    "params.yaml with few strategies, and pictures that are made in a moment."
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["strategies"] = {k: copy.deepcopy(params["strategies"][k]) for k in KEPT}
    params["run"] |= {"strategies": [k for k in KEPT if k not in ("source_only", "noise_da", "rcl")], "seeds": [0]}
    params["corpus"] |= {"directory": "mine", "train": ["train/*"], "validation": ["val/*"], "test": ["test/*"], "unpaired": ["train/1"]}
    params["benchmark"]["crop"] = 64
    return params


def files():
    "(place, change, text of the file)"
    whole = base()
    for path in places(whole):
        place = ".".join(map(str, path))

        def changed(edit):
            params = copy.deepcopy(whole)
            parent = params
            for key in path[:-1]:
                parent = parent[key]
            edit(parent, path[-1])
            return yaml.safe_dump(params, sort_keys=False)

        present = whole
        for key in path:
            present = present[key]
        for name, value in VALUES.items():
            if value != present or isinstance(value, bool) != isinstance(present, bool):
                yield place, name, changed(lambda parent, key: parent.__setitem__(key, value))
        if isinstance(path[-1], str):
            yield place, "missing", changed(lambda parent, key: parent.pop(key))
            yield place, "misspelt", changed(lambda parent, key: parent.__setitem__(key + key[-1], parent.pop(key)))
            yield place, "twice", changed(lambda parent, key: parent.__setitem__("SECOND", parent[key])).replace("SECOND", path[-1])


class Hang(BaseException):
    "Ten seconds of processor time for one small file."


def _hang(*_):
    raise Hang


def outcome(here, capsys, place, change, text):
    "refused, right, or what is wrong."
    (here / "params.yaml").write_text(text)
    stage = STAGE.get(place.split(".")[0], "results")
    signal.signal(signal.SIGPROF, _hang)
    signal.setitimer(signal.ITIMER_PROF, 10)
    try:
        code = pipeline.main([stage])
    except Hang:
        return f"{place} {change}: hangs"
    except BaseException as error:
        return f"{place} {change}: traceback: {error!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    out = capsys.readouterr().err
    told = [line for line in out.splitlines() if line.startswith(f"irnb {stage}: error: ")]
    if code == 0:
        right = any(re.fullmatch(p, place) and re.fullmatch(c, change) for p, c, *_ in RIGHT)
        return "right" if right else f"{place} {change}: silently accepted"
    names = [part for part in place.split(".") if not part.isdigit()]
    if code != 1 or len(told) != 1 or "Traceback" in out or "unexpected" in told[0]:
        return f"{place} {change}: no sentence: {out[-500:]}"
    if "params.yaml" not in told[0] or names[-1] not in told[0] and ".".join(names[:-1]) not in told[0]:
        return f"{place} {change}: names neither file nor place: {told[0]}"
    return "refused"


@pytest.fixture
def here(tmp_path, monkeypatch):
    "A working folder with four small pictures and a report's summary."
    import torch
    from irnb.image_files import write_image
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("train/0", "train/1", "train/2", "val/3", "test/4")):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(tmp_path / "mine" / f"{name}.png", torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(i)))
    for name in ("default", "x", "1e-3"):
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "summary.md").write_text("a table")
    return tmp_path


def storm(here, capsys, cases):
    found = Counter()
    for case in cases:
        result = outcome(here, capsys, *case)
        found[result] += 1
    wrong = [k for k in found if k not in ("refused", "right")]
    kinds = {kind: sum(kind in w for w in wrong) for kind in ("traceback", "silently accepted", "hangs")}
    return found, wrong, kinds


def test_the_file_that_is_changed_is_right(here, capsys):
    (here / "params.yaml").write_text(yaml.safe_dump(base()))
    assert all(pipeline.main([stage]) == 0 for stage in ("synthesize", "sources", "results"))


def test_a_sample_of_wrong_files(here, capsys):
    "Every place once in a while, every change: those that the reading of the file finds."
    cases = [c for c in files() if c[1] in ("misspelt", "twice", "mapping", "negative", "nan")][::13]
    found, wrong, _ = storm(here, capsys, cases)
    assert len(cases) >= 20 and not wrong, "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.storm
@pytest.mark.filterwarnings("ignore")
def test_wrong_parameter_files(here, capsys):
    cases = list(files())[::3]  # a place has 17 changes, so that every third file meets all places and all changes
    found, wrong, kinds = storm(here, capsys, cases)
    with capsys.disabled():
        print(f"\nparameter storm: {len(cases)} files: {found['refused']} refused, {found['right']} right, {kinds['traceback']} tracebacks, "
              f"{kinds['silently accepted']} silently accepted, {kinds['hangs']} hangs over 10 s")
    assert len(cases) >= 200 and not wrong, "\n".join(wrong)
