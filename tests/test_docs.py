"""README.md and docs/: the snippets run, and the flags, files and commands in them exist."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import epochs_of

import evaluate
import train
from common import datasets, symbols
from common.checks import check
from common.config import parse
from vit import ViT

ROOT = Path(__file__).parents[1]
DOCS = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
TEXT = "\n".join(DOCS.values())
ELSEWHERE = {"--standalone", "--nproc-per-node", "--quick"}  # of torchrun and reproduce.sh


def snippet(file: str) -> str:
    """The lines of docs/copying.md that import from a file."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS[ROOT / "docs/copying.md"], re.DOTALL)
    return next(block for block in blocks if f"from {file} import" in block)


def run(file: str, **names) -> dict:
    """The names that the snippet of a file leaves behind, given those that it needs."""
    names |= {"loss": torch.tensor(0.0)}
    exec(snippet(file), names)
    return names


class TimmLike(ViT):
    """A ViT with the interface of timm's."""

    num_features, num_prefix_tokens = 32, 1

    def __init__(self):
        super().__init__(224, 16, 3, self.num_features, 2, 4)

    def forward_features(self, images):
        tokens, hook = [], self.norm.register_forward_hook(lambda m, inputs, output: tokens.append(output))
        self.row = super().forward(images).attention
        hook.remove()
        return tokens[0]

    def forward(self, images):
        return self.forward_features(images)[:, 0]


def test_the_span_snippet_guides_the_first_heads_of_a_timm_vit():
    masks = torch.zeros(2, 224, 224)
    masks[0, 30:90, 30:90] = masks[1, 140:200, 60:170] = 1
    vit, images = TimmLike(), torch.rand(2, 3, 224, 224)
    crops = dict(views=images, theta=torch.eye(2, 3).expand(2, 2, 3), index=[0, 1])
    names = run("attention_priors", masks=masks, reference=images[0], images=images, vit=vit, **crops)
    torch.testing.assert_close(names["attention"], vit.row)
    (gradient,) = torch.autograd.grad(names["loss"], names["attention"])
    assert gradient[:, :2].any() and not gradient[:, 2:].any()


def test_the_dino_snippet_trains_any_student_and_moves_its_teacher():
    encoder = TimmLike()
    names = run("dino", encoder=encoder, views=torch.rand(4, 3, 224, 224))
    names["loss"].backward()
    assert encoder.patch_embed.proj.weight.grad.any()
    torch.nn.init.ones_(encoder.cls_token)
    teacher = names["teacher"][0].cls_token
    before = teacher.clone()
    exec("\n".join(snippet("dino").splitlines()[-2:]), names)
    torch.testing.assert_close(teacher, 0.996 * before + 0.004)
    assert teacher.grad is None


def test_the_relvit_snippet_trains_a_vit_without_position_embeddings():
    vit, images = TimmLike(), torch.rand(2, 3, 224, 224)
    inputs = dict(vit=vit, images=images, generator=torch.Generator(), normalise=lambda x: x - 0.5)
    run("relvit", **inputs)["loss"].backward()
    assert vit.patch_embed.proj.weight.grad.any() and vit.pos_embed.grad is None and not vit.pos_embed.any()


def test_the_simpool_snippet_pools_any_convnet():
    convnet = torch.nn.Conv2d(3, 8, 16, stride=16)
    convnet.num_features, convnet.forward_features = 8, convnet.forward
    names = run("simpool", convnet=convnet, images=torch.rand(2, 3, 64, 64), head=torch.nn.Linear(8, 5))
    assert names["logits"].shape == (2, 5) and names["attention"].shape == (2, 16)
    torch.testing.assert_close(names["attention"].sum(dim=1), torch.ones(2))


def test_the_isnet_snippet_trains_any_classifier():
    mask = torch.zeros(3, 1, 32, 32)
    mask[:, :, 4:12, 4:12] = 1
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 5), torch.nn.ReLU(True), torch.nn.Flatten())
    model.append(torch.nn.Linear(4 * 28 * 28, 2))
    run("isnet_lrp", model=model, plain=model, images=torch.rand(3, 1, 32, 32), mask=mask)["loss"].backward()
    assert model[0].weight.grad.any()


def commands(script: str) -> list[list[str]]:
    """The arguments of every `python SCRIPT ...` and `torchrun ... SCRIPT ...` in README.md and docs/."""
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)).splitlines()
    return [shlex.split(line.split(script, 1)[1], comments=True) for line in lines if f"{script} " in line]


@pytest.mark.parametrize("words", commands("train.py"), ids=" ".join)
def test_every_train_command_parses_and_makes_sense(words, monkeypatch):
    monkeypatch.setattr(Path, "is_dir", lambda path: True)  # the data and runs that they need
    for flag in {"--init", "--config"} & set(words):  # they name a run or weights, which are not here
        del words[words.index(flag) : words.index(flag) + 2]
    check(*parse(words))


def test_every_flag_exists(capsys):
    for script in (train, evaluate, symbols):
        with pytest.raises(SystemExit):
            script.main(["--help"])
    known = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) | ELSEWHERE
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"<!--|-->", "", TEXT))) <= known


def test_every_public_dataset_has_a_row(capsys):
    with pytest.raises(SystemExit):
        datasets.main(["--help"])
    choices = re.search(r"{([\w,]+)}", capsys.readouterr().out)[1].split(",")
    assert re.findall(r"^\| `(\w+)` \| `.*` \| `--", DOCS[ROOT / "docs/data.md"], re.MULTILINE) == choices


def test_every_file_exists():
    links = {path.parent / link for path in DOCS for link in re.findall(r"\]\(([^):#]+)[#)]", DOCS[path])}
    named = set(re.findall(r"`(?:\./)?([\w/]+\.(?:py|sh))", TEXT))
    modules = re.findall(r"python -m ((?:common|experiments)\.\w+)", TEXT)
    named |= {f"{module.replace('.', '/')}.py" for module in modules}
    assert not [path for path in links | {ROOT / name for name in named} if not path.exists()]


def test_each_line_that_an_exercise_breaks_occurs_once_in_its_file_and_its_test_exists():
    text = DOCS[ROOT / "docs/exercises.md"]
    parts = re.findall(r"^## .*`(\w+\.py)`\n```diff\n-(.*)\n\+(.*)\n```$", text, re.MULTILINE)
    assert len(parts) == text.count("\n## ") == text.count("```diff") == 10
    for file, broken, changed in parts:
        lines = (ROOT / file).read_text().splitlines()
        assert lines.count(broken) == 1 and changed not in lines, broken
    for file, word in re.findall(r"pytest (tests/\w+\.py) -k \"?(\w+)", text):
        assert re.search(rf"^def test_\w*{word}", (ROOT / file).read_text(), re.MULTILINE), word


def test_the_readme_explains_what_an_epoch_prints(span_run):
    for name in epochs_of(span_run)[0].keys() - {"epoch", "images_per_s"}:
        assert f"`{name}`" in DOCS[ROOT / "README.md"], name


def test_the_readme_is_short_and_lists_every_file_of_the_root():
    readme = DOCS[ROOT / "README.md"]
    assert len(readme.splitlines()) <= 200
    listed = re.findall(r"^\| `(\w+\.py)` \|", readme, re.MULTILINE)
    assert {*listed} == {path.name for path in ROOT.glob("*.py")}
