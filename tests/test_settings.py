import re
from pathlib import Path

import pytest
import tomli_w
from pydantic import BaseModel, ValidationError

import cryoai
from cryoai.training.settings import Settings
from stacks import refusal

SOURCE = Path(cryoai.__file__).parent
SECTIONS = ("bootstrap", "amortized", "placement", "refinement")


def assembled(given=None, *, preset="auto", file=None):
    return Settings.assemble(preset, file, given or {})


def toml(path, values):
    path.write_text(tomli_w.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"boks": 64}, "boks"),
        ({"bootstrap": {"steps": 5}}, "bootstrap.steps"),
        ({"bootstrap": {"n_steps": 9}}, "bootstrap.n_steps"),
        ({"bootstrap": {"n_starts": 0}}, "bootstrap.n_starts"),
        ({"bootstrap": {"n_starts": 3, "max_starts": 2}}, "bootstrap.max_starts"),
        ({"amortized": {"box": 33}}, "amortized.box"),
        ({"amortized": {"box": 30}}, "amortized.box"),
        ({"amortized": {"box": 32, "max_radius": 17}}, "amortized.max_radius"),
        ({"amortized": {"learning_rate": 0}}, "amortized.learning_rate"),
        ({"amortized": {"n_hypotheses": 0}}, "amortized.n_hypotheses"),
        ({"amortized": {"n_hypotheses": 65}}, "amortized.n_hypotheses"),
        ({"amortized": {"n_hypotheses": 12}}, "amortized.n_hypotheses"),
        ({"amortized": {"encoder": "transformer"}}, "amortized.encoder"),
        ({"amortized": {"encoder_input": "whitened"}}, "amortized.encoder_input"),
        ({"amortized": {"encoder_width": 3}}, "amortized.encoder_width"),
        ({"amortized": {"symmetrization": "quarter-turn"}}, "amortized.symmetrization"),
        ({"amortized": {"volume": "gaussians"}}, "amortized.volume"),
        ({"amortized": {"wake_interval": 0}}, "amortized.wake_interval"),
        ({"amortized": {"n_starts": 0}}, "amortized.n_starts"),
        ({"amortized": {"first_radius": -1}}, "amortized.first_radius"),
        ({"amortized": {"max_radius": 10, "first_radius": 11}}, "amortized.first_radius"),
        ({"amortized": {"wake_batch_size": 1}}, "amortized.wake_batch_size"),
        ({"amortized": {"sleep_batch_size": -1}}, "amortized.sleep_batch_size"),
        ({"placement": {"n_iterations": -1}}, "placement.n_iterations"),
        ({"refinement": {"max_rounds": 0}}, "refinement.max_rounds"),
        ({"box": 31}, "box"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"device": "tpu"}, "device"),
        ({"contrast": "grey"}, "contrast"),
        ({"stages": ["bootstrap", "polish"]}, "stages.1"),
    ],
)
def test_a_setting_that_is_unknown_or_out_of_range_is_refused_by_name(given, key):
    assert refusal(assembled, given).startswith(f"setting {key}: ")


@pytest.mark.parametrize(
    "stages",
    [
        ["amortized", "bootstrap"],
        ["refinement", "bootstrap"],
        ["bootstrap", "bootstrap"],
        ["refinement"],
        [],
    ],
)
def test_stages_come_once_in_their_order_and_with_a_map_to_start_from(stages):
    assert refusal(assembled, {"stages": stages}).startswith("setting stages: ")


@pytest.mark.parametrize(
    "stages", [["bootstrap"], ["amortized"], ["bootstrap", "refinement"], ["amortized", "refinement"]]
)
def test_stages_can_be_left_out(stages):
    assert assembled({"stages": stages}).stages == tuple(stages)


def test_without_anything_given_the_settings_are_the_defaults():
    assert assembled() == Settings()


def test_a_refusal_names_both_of_two_settings_that_do_not_fit_together():
    message = refusal(assembled, {"amortized": {"max_radius": 10, "first_radius": 11}})
    assert "11" in message
    assert "max_radius, 10" in message
    assert "polar" in refusal(assembled, {"amortized": {"n_hypotheses": 12}})
    assert "polar" in refusal(assembled, {"amortized": {"n_hypotheses": 1}})


@pytest.mark.parametrize(
    ("encoder", "n_hypotheses"), [("polar", 2), ("polar", 64), ("convolutional", 1), ("convolutional", 3)]
)
def test_the_polar_encoder_takes_powers_of_two_and_the_convolutional_one_any_number(encoder, n_hypotheses):
    given = {"encoder": encoder, "n_hypotheses": n_hypotheses}
    assert assembled({"amortized": given}).amortized.n_hypotheses == n_hypotheses


def test_the_band_limit_may_grow_or_be_there_from_the_start():
    for first in (2, 12):
        assert assembled({"amortized": {"max_radius": 12, "first_radius": first}}).amortized.first_radius == first


def test_the_preset_of_the_paper_is_the_published_method_with_turns_in_the_plane_built_in():
    paper = assembled(preset="paper")
    assert paper.stages == ("amortized",)
    assert paper.placement.n_iterations == 0
    a = paper.amortized
    assert (a.encoder, a.n_hypotheses, a.symmetrization) == ("polar", 16, "none")
    assert (a.volume, a.volume_width, a.sleep_batch_size, a.wake_batch_size) == ("fouriernet", 256, 0, 64)
    assert a.first_radius < a.max_radius
    assert a.n_starts > 1


def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = toml(tmp_path / "s.toml", {"seed": 7, "amortized": {"n_steps": 11, "learning_rate": 2e-4}})
    found = assembled({"amortized": {"n_steps": 12}}, preset="paper", file=file)
    assert found.amortized.n_steps == 12
    assert found.amortized.learning_rate == 2e-4
    assert found.amortized.first_radius == 4
    assert found.seed == 7


@pytest.mark.parametrize("preset", ["auto", "paper"])
def test_settings_come_back_from_their_file_as_they_were(tmp_path, preset):
    given = {"box": 64, "seed": 3, "amortized": {"box": 48, "max_radius": 20, "learning_rate": 3.3e-4}}
    settings = assembled(given, preset=preset)
    file = tmp_path / "settings.toml"
    file.write_text(settings.to_toml(), encoding="utf-8")
    # Whatever preset they came from.
    assert assembled(file=file) == assembled(preset="paper", file=file) == settings
    without_box = assembled(preset=preset)
    file.write_text(without_box.to_toml(), encoding="utf-8")
    assert assembled(file=file) == without_box


@pytest.mark.parametrize("content", [b"seed = = 3", b"\xff\xfe", None])
def test_a_file_that_is_no_settings_file_is_refused_by_name(tmp_path, content):
    file = tmp_path / "s.toml"
    if content is not None:
        file.write_bytes(content)
    assert f"--settings {file}" in refusal(assembled, file=file)
    assert f"--settings {tmp_path}" in refusal(assembled, file=tmp_path)


def test_a_file_with_a_wrong_setting_is_refused_by_the_name_of_the_setting(tmp_path):
    file = toml(tmp_path / "s.toml", {"bootstrap": {"n_step": 50}})
    assert "setting bootstrap.n_step" in refusal(assembled, file=file)
    file = toml(tmp_path / "s.toml", {"bootstrap": 3})
    assert "setting bootstrap" in refusal(assembled, file=file)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError):
        Settings().seed = 3
    with pytest.raises(ValidationError):
        Settings().bootstrap.n_steps = 3


def test_every_setting_has_an_effect():
    """Each field is read somewhere outside the module that defines it."""
    text = "\n".join(p.read_text(encoding="utf-8") for p in SOURCE.rglob("*.py") if p.name != "settings.py")
    top = [name for name in Settings.model_fields if name not in SECTIONS]
    nested = [(s, name) for s in SECTIONS for name in Settings.model_fields[s].annotation.model_fields]
    assert len(nested) > 20
    unread = [name for name in top if not re.search(rf"\bsettings\.{name}\b", text)]
    # Where a section has a name of its own: chosen = settings.amortized.
    own = {s: rf"(settings\.{s}|{m})" for m, s in re.findall(r"(\w+) = settings\.(\w+)\n", text)}
    unread += [
        f"{s}.{name}" for s, name in nested if not re.search(own.get(s, rf"settings\.{s}") + rf"\.{name}\b", text)
    ]
    assert unread == []


def test_every_setting_says_what_it_is():
    for model in (Settings, *(Settings.model_fields[s].annotation for s in SECTIONS)):
        assert issubclass(model, BaseModel)
        lines = (SOURCE / "training" / "settings.py").read_text(encoding="utf-8").splitlines()
        for name in model.model_fields:
            if name in SECTIONS:
                continue
            at = next(i for i, line in enumerate(lines) if line.startswith(f"    {name}: "))
            assert lines[at + 1].startswith('    """'), name
