"""Other ways to keep DINO from collapsing on small data, which `dino.py` does not have.

    python -m experiments.remedies sinkhorn [flags of train.py]

`sinkhorn`, `warmed` and `followed` replace the targets of the published loss: add --koleo 0 --max-entropy 1.
`always` keeps KoLeo and the ceiling on the entropy in every step; `koleo` is the same, for --max-entropy 1.
`wide` lets both act in a larger range of the KL.
docs/collapse.md has the results.
"""

import json
import math
import sys

import torch
from torch import Tensor

import dino
import train
from common.checkpoint import write_file
from common.config import parse


class Sinkhorn(dino.DINOLoss):
    """SwAV's targets (arXiv 2006.09882), as in DINOv2: prototypes get equal shares of each batch."""

    @torch.no_grad()
    def teacher_probabilities(self, teacher: Tensor, teacher_temp: float) -> Tensor:
        """Scores (..., K) to probabilities (..., K), by 3 iterations of Sinkhorn and Knopp."""
        log_q = teacher.flatten(0, -2) / teacher_temp  # (B, K)
        for _ in range(3):
            log_q = log_q.log_softmax(dim=0).log_softmax(dim=1)  # equal prototypes, then sums of 1
        return log_q.exp().view_as(teacher)


class Warmed(dino.DINOLoss):
    """The release's schedule: the teacher's temperature rises from 4/7 of --teacher-temp in 100 steps."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.register_buffer("step", torch.tensor(0))  # in checkpoints, for --resume

    def temperature(self, teacher: Tensor, highest: float, max_entropy: float, w: Tensor) -> Tensor:
        """tau_t of the next step."""
        self.step += 1
        return highest * (4 + 3 * (self.step / 100).clamp(max=1)) / 7


class Followed(dino.DINOLoss):
    """A temperature, found anew each step, at which the entropy of the targets is half of log K."""

    @torch.no_grad()
    def temperature(self, teacher: Tensor, highest: float, max_entropy: float, w: Tensor) -> Tensor:
        """tau_t, by bisection of its logarithm, for scores (2, B, K)."""
        low, high = torch.tensor(1e-5), torch.tensor(10.0)
        for _ in range(30):
            middle = (low * high).sqrt()
            entropy = torch.special.entr(self.teacher_probabilities(teacher, middle)).sum(dim=-1).mean()
            low, high = (middle, high) if entropy < math.log(teacher.shape[-1]) / 2 else (low, middle)
        return middle


class Always(dino.CollapseMonitor):
    """KoLeo and the ceiling on the entropy in full in every step, near collapse or not."""

    def nearness(self) -> Tensor:
        """w = 1."""
        return torch.ones_like(self.kl)


class Wide(dino.CollapseMonitor):
    """Both additions in full up to twice the floor, as by default, but not at all from four times on."""

    def nearness(self) -> Tensor:
        """w = 2 - KL / (2 f log K), from 0 to 1."""
        return (2 - self.kl / (2 * self.floor * math.log(len(self.usage)))).clamp(0, 1)


# Each class replaces its base class in dino.py.
WAYS = {"sinkhorn": Sinkhorn, "warmed": Warmed, "followed": Followed}
WAYS |= {"always": Always, "koleo": Always, "wide": Wide}


def main(way: str, argv: list[str]) -> None:
    """Train in another way, and put the command that does so into config.json."""
    setattr(dino, WAYS[way].__base__.__name__, WAYS[way])
    train.main(argv)
    path = parse(argv)[0].out / "config.json"
    record = json.loads(path.read_text())
    record["command"] = record["command"].replace("train.py", f"-m experiments.remedies {way}", 1)
    write_file(path, record)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in WAYS:
        main(sys.argv[1], sys.argv[2:])
    else:
        sys.exit(__doc__)
