"""One line for each logged step, and what a resumed run did itself."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback

from ds_minis.integrations.trainer_metrics import StepMetrics, attach_metrics


class Progress(TrainerCallback):
    """Prints what is logged, in the place of the Trainer's dictionaries.

    Attributes:
        first_step, first_tokens: where this run began; more than 0 where it continues another one.
        mini_sequence_metrics: what ds_minis adds to the logs, as with its `MiniSequenceCallback`: peak memory, tokens per
            second, MFU. Here for runs without mini-sequences too, which one compares with.
    """

    first_step = first_tokens = 0
    mini_sequence_metrics: StepMetrics | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.first_step, self.first_tokens = state.global_step, state.num_input_tokens_seen
        attach_metrics(Trainer)
        self.mini_sequence_metrics = StepMetrics(model, state)

    def on_train_end(self, args, state, control, **kwargs):
        self.mini_sequence_metrics = None

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        line = line_of(logs or {}, state.global_step, state.max_steps)
        if line and state.is_world_process_zero:
            print(line, flush=True)


def line_of(logs: dict[str, Any], step: int, num_steps: int) -> str:
    """What is said of a log entry; empty for the last one, whose content is in the summary."""
    name = next((name for name in ("loss", "eval_loss") if name in logs), None)
    if name is None:
        return ""
    words = [f"step {step:>{len(str(num_steps))}}/{num_steps}", f"{name.replace('_', ' ')} {logs[name]:.4f}"]
    if "grad_norm" in logs:
        words.append(f"gradient norm {float(logs['grad_norm']):.3g}")
    if "learning_rate" in logs:
        words.append(f"learning rate {logs['learning_rate']:.2e}")
    if "tokens_per_second" in logs:
        words.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(words)
