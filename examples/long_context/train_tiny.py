"""From 64 to 2,048 tokens on a CPU: a tiny model in stages, with RoPE's base from the schedule, and with it left fixed.

torchrun --nproc_per_node 2 train_tiny.py OUTPUT      (`run_tiny.sh` does so, and draws the pictures)

The model is trained at 64 tokens from random weights: first to copy, then to find needles. From there it goes on twice, with
the same tests in the same order: `growing`, where each stage changes RoPE's base to what `ds_minis.context` gives for its
length, and `fixed`, where it stays. The processes share each sequence (`sequence_parallel`); mini-sequences are on.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from tiny import make_model, make_tokenizer, repeating_batch, write_text
from torch.nn.parallel import DistributedDataParallel
from transformers.utils import logging

from ds_minis import convert_to_mini_sequence
from ds_minis.context import rope_theta_for
from ds_minis.context.needle.model import describe, make_needle_maker
from ds_minis.context.needle.run import Ranks, run_needle, write
from ds_minis.context.needle.task import NeedleMaker, NeedleTask
from ds_minis.context.rope import change_rope

BASE_LENGTH, BASE_THETA = 64, 100.0
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
MINI_SEQUENCES = {"chunk_size": 1024}


@dataclass(frozen=True)
class TinyStage:
    """What is trained at one length: optimizer steps, sequences in each, the largest learning rate."""

    length: int
    steps: int
    batch: int
    learning_rate: float


COPYING = TinyStage(64, 700, 32, 3e-3)
STAGES = (
    TinyStage(64, 150, 64, 2e-3),
    TinyStage(256, 100, 32, 2e-3),
    TinyStage(1024, 120, 8, 2e-3),
    TinyStage(2048, 120, 4, 1e-3),
)


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    world = 1
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
        world = dist.get_world_size()
    run = Run(args, world)
    model = make_model(len(run.tokenizer), BASE_LENGTH, BASE_THETA, args.seed)
    run.say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {world} processes")
    convert_to_mini_sequence(model, {**MINI_SEQUENCES, "sequence_parallel": world})
    run.train(model, scaled(COPYING, args.scale), "copying", copies=True)
    run.train(model, scaled(STAGES[0], args.scale), "needles")
    start = copy.deepcopy(model.state_dict())
    for way in ("growing", "fixed"):
        model.load_state_dict(start)
        change_rope(model, theta=BASE_THETA, length=BASE_LENGTH)
        run.evaluate(model, way, 0, BASE_LENGTH)
        for number, stage in enumerate(STAGES[1:], 1):
            stage = scaled(stage, args.scale)
            theta = rope_theta_for(stage.length, BASE_LENGTH, BASE_THETA) if way == "growing" else BASE_THETA
            change_rope(model, theta=theta, length=stage.length)
            run.train(model, stage, way)
            run.evaluate(model, way, number, stage.length)
        run.save(model, way)
    run.say(f"done after {time.monotonic() - run.start:.0f} s")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps, for a trial (default: 1)")
    parser.add_argument("--lengths", default="64,256,512,768,1024,1280,1536,1792,2048", help="that are tested")
    return parser.parse_args()


def scaled(stage: TinyStage, scale: float) -> TinyStage:
    return dataclasses.replace(stage, steps=max(1, round(stage.steps * scale)))


class Run:
    """What all stages share: text, tokenizer, tests, and where results go."""

    def __init__(self, args: argparse.Namespace, world: int):
        self.seed, self.world, self.output, self.start = args.seed, world, args.output, time.monotonic()
        self.lengths = [int(length) for length in args.lengths.split(",")]
        self.is_main = world == 1 or dist.get_rank() == 0
        self.tokenizer = make_tokenizer()
        self.numbers = torch.tensor(self.tokenizer.convert_tokens_to_ids([f"{n:02d}" for n in range(100)]))
        if self.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            write_text(self.output / "train.txt", 20_000, seed=args.seed + 1)
            write_text(self.output / "test.txt", 20_000, seed=args.seed + 2)  # sentences that no training has seen
        if world > 1:
            dist.barrier()
        self.training, self.tests = self._maker("train", 10_000 + args.seed, 1), self._maker("test", 0, 2)

    def _maker(self, split: str, seed: int, samples: int) -> NeedleMaker:
        task = NeedleTask(num_samples=samples, rnd_number_digits=4, seed=seed)
        return make_needle_maker(task, self.tokenizer, [self.output / f"{split}.txt"])

    def train(self, model, stage: TinyStage, way: str, *, copies: bool = False) -> None:
        """One stage. Every process draws the same batches, and runs its part of each sequence."""
        generator = torch.Generator().manual_seed(1000 * self.seed + stage.length + copies)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
        engine = DistributedDataParallel(model) if self.world > 1 else model
        losses, start = [], time.monotonic()
        model.train()
        for step in range(stage.steps):
            rate = stage.learning_rate * min(1.0, (step + 1) / 10) * (1 - 0.95 * step / stage.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            if copies:
                ids, labels = repeating_batch(stage.batch, stage.length, len(self.tokenizer), self.numbers, generator)
            else:
                ids, labels = self.needles(stage, step, generator)
            loss = engine(input_ids=ids, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
        last = losses[-10:]
        self.say(
            f"{way:>8} {stage.length:>5} tokens, theta {model.config.rope_parameters['rope_theta']:>8,.0f}: loss "
            f"{losses[0]:.3f} to {sum(last) / len(last):.3f} in {stage.steps} steps, {time.monotonic() - start:.0f} s"
        )

    def needles(self, stage: TinyStage, step: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels, `(batch, length)`: needle tests with their answers. Every other batch is shorter, at any scale."""
        shorter = BASE_LENGTH * (stage.length / BASE_LENGTH) ** torch.rand((), generator=generator).item()
        length = round(shorter) if step % 2 else stage.length
        numbers = torch.randint(2**40, (stage.batch,), generator=generator).tolist()
        # More often at the ends than in the middle, where a model fails first.
        depths = (1.4 * torch.rand(stage.batch, generator=generator) - 0.2).clamp(0, 1).tolist()
        tests = [self.training.make(length, depth, number) for depth, number in zip(depths, numbers, strict=True)]
        ids = torch.tensor([test.prompt_ids + test.answer_ids for test in tests])
        labels = torch.full_like(ids, -100)
        for row, test in zip(labels, tests, strict=True):
            row[len(test.prompt_ids) :] = torch.tensor(test.answer_ids)
        return ids, labels

    def evaluate(self, model, way: str, number: int, length: int) -> None:
        """Writes a results file, a frame of the animation."""
        ranks = Ranks.current(self.world)
        cells = [(n, depth) for n in self.lengths for depth in DEPTHS]
        about = describe(model, way, ["test.txt"]) | {"step": number, "trained_length": length}
        results = run_needle(model, self.tests, cells, about=about, ranks=ranks, batch_size=2)
        if self.is_main:
            write(self.output / f"{way}-{number}.json", results)
        model.train()
        self.say(
            f"{way:>8} {length:>5} tokens: {100 * results['accuracy']:.0f}% of answers right, {results['seconds']} s"
        )

    def save(self, model, way: str) -> None:
        """Writes a folder that `ds-minis needle`, or plain transformers, loads."""
        if self.is_main:
            model.save_pretrained(self.output / way)
            self.tokenizer.save_pretrained(self.output / way)
            (self.output / "run.json").write_text(json.dumps({"seed": self.seed, "processes": self.world}) + "\n")

    def say(self, line: str) -> None:
        if self.is_main:
            print(line, flush=True)


if __name__ == "__main__":
    main()
