"""Command-line options: where settings come from, and which are refused."""

import json
import re
from pathlib import Path

import pytest
from conftest import refuses

from common.config import as_json, epochs_for, parse


def test_defaults_that_the_golden_settings_leave_out():
    config, typed = parse([])
    assert typed == set() and (config.koleo, config.max_entropy) == (0.1, 0.8)
    config = parse(["--task", "classify"])[0]
    assert (config.swap, config.isnet_every, config.shift) == (1.0, 3, 0.0)
    assert parse("--task classify --backbone vit".split())[0].shift == 0.06
    assert epochs_for("pretrain", "resnet", 10) == 35 and epochs_for("classify", "vit", 53) == 142


def test_underscores_and_the_names_in_dino_s_and_timm_s_scripts_are_understood():
    theirs = "--output_dir o --data_path d --momentum_teacher 0.9 --global_crops_scale 0.5 1 --hflip 0.5"
    theirs += " --local_crops_scale 0.1 0.3 --drop_path_rate 0.1 --patch_size=4 --sample my_image"
    ours = "--out o --data d --momentum 0.9 --global-scale 0.5 1 --flip 0.5"
    ours += " --local-scale 0.1 0.3 --drop-path 0.1 --patch-size 4 --sample my_image"
    assert parse(theirs.split()) == parse(ours.split())
    assert parse(theirs.split())[0].sample == "my_image"


def test_a_misspelt_flag_gets_a_suggestion(refused):
    assert refused(parse, "--epoch", "3").endswith("unknown argument --epoch; did you mean --epochs?")
    assert "did you mean --embed-dim?" in refused(parse, "--embed_dims", "3")
    assert refused(parse, "--quux").endswith("unknown argument --quux")


def run_folder(tmp_path: Path, words: str, **edited) -> Path:
    """The folder of a run that was started with these flags, its config.json perhaps edited."""
    record = as_json(parse(words.split())[0]) | {"command": f"python train.py {words}", "channels": 1}
    (tmp_path / "config.json").write_text(json.dumps(record | edited))
    return tmp_path


def test_config_repeats_a_run_but_not_over_it_and_what_is_typed_beside_it_wins(tmp_path):
    words = "--task classify --backbone vit --isnet 2 --marker 1 --seed 3 --device cpu"
    words += " --global-scale 0.5 0.9 --no-follow --amp --prior-blur 0.1"
    run = run_folder(tmp_path, f"{words} --overwrite --out {tmp_path}")
    again = parse(["--config", str(run / "config.json"), "--seed", "4", "--device", "cpu"])[0]
    before = parse(f"{words} --out {tmp_path}".split())[0]
    assert as_json(again) == as_json(before) | {"seed": 4}  # and --overwrite is not repeated
    assert parse(["--config", str(run)])[0].seed == 3  # its folder will do
    refuses("--overwrite would replace that run: add --out", parse, ["--config", str(run), "--overwrite"])
    assert parse(["--config", str(run), "--overwrite", "--out", "other"])[0].out == Path("other")


def test_a_start_from_a_run_has_its_heads(tmp_path):
    """Weights of other heads have the same shapes, and would fit without a word."""
    run = str(run_folder(tmp_path, "--num-heads 3"))
    assert parse(["--init", run])[0].num_heads == parse(["--init", run, "--num-heads", "3"])[0].num_heads == 3
    refuses("has --num-heads 3, not 6: leave it out", parse, ["--init", run, "--num-heads", "6"])
    run = str(run_folder(tmp_path, "--pool simpool --pool-heads 1 --simpool-gamma 2"))
    for flag, value, has in (("--pool-heads", "3", "1"), ("--simpool-gamma", "1", "2.0")):
        refuses(f"has {flag} {has}, not {value}", parse, ["--init", run, flag, value])


def test_a_config_from_before_a_setting_existed_takes_today_s_default_and_says_so(tmp_path, capsys):
    path = run_folder(tmp_path, "--isnet-margin 0.1") / "config.json"
    path.write_text(path.read_text().replace('"isnet_margin": 0.1, ', ""))
    assert parse(["--config", str(tmp_path)])[0].isnet_margin is None
    assert "is older than isnet_margin: today's defaults are used" in capsys.readouterr().out


EDITED = {"epoch": 3, "epochs": "many", "lr": True, "findings": [], "flip": [1], "amp": 1, "init": 3}
EDITED |= {"ssl": "simclr", "local_scale": [1.0], "global_scale": 1.0}


@pytest.mark.parametrize("name", EDITED)
def test_what_is_no_setting_in_config_json_is_refused_by_name(name, tmp_path):
    run, line = run_folder(tmp_path, "", **{name: EDITED[name]}), f"{name} {json.dumps(EDITED[name])}, which"
    refuses(f"has {re.escape(line)}", parse, ["--config", str(run)])


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"task":' * 99_999, None])
def test_what_is_no_run_is_refused(text, tmp_path):
    if text:
        (tmp_path / "config.json").write_text(text)
    for flag in ("--config", "--init"):
        refuses(f"{flag} {tmp_path}: there is no config.json of a run, or", parse, [flag, str(tmp_path)])


def test_a_preset_changes_defaults_and_what_is_typed_wins(tmp_path):
    words = ["--task", "classify", "--preset", "published", "--lrp-epsilon", "0.5"]
    config, _ = parse(words)
    assert (config.isnet_e, config.lrp_gamma, config.isnet_layers) == (1.0, 0.0, "blocks")
    assert config.lrp_epsilon == 0.5 and config.isnet == pytest.approx(0.7 / 0.3)
    assert parse(words[:2])[0].isnet == 0
    run = run_folder(tmp_path, "--task classify --isnet 0.3 --lrp-epsilon 0.1")
    again, _ = parse(["--config", str(run), "--out", "other", "--preset", "published"])
    assert again.isnet == config.isnet and again.lrp_epsilon == 0.01  # typed after the run's own
    backbones = [parse([*words[:2], "--backbone", name])[0].isnet_margin for name in ("resnet", "vit")]
    assert backbones == [0.03, 0] and config.isnet_margin == 0


def test_init_brings_the_encoder_s_sizes_and_typed_ones_win(tmp_path):
    run = run_folder(tmp_path, "--embed-dim 24 --depth 2 --num-heads 3 --patch-size 4")
    config, _ = parse(["--task", "classify", "--init", str(run), "--depth", "1"])
    assert (config.backbone, config.embed_dim, config.depth, config.patch_size) == ("vit", 24, 1, 4)
    assert config.lr == 5e-4 and config.init == run  # the defaults of a ViT that classifies
    words = f"--task classify --init {run} --backbone resnet".split()
    refuses("is not a resnet: leave out --backbone; for its masks alone", parse, words)
    run_folder(tmp_path, "", depth=None, pool=None)
    refuses(f"--init {run}: its config.json lacks depth, pool; restore it", parse, ["--init", str(run)])
