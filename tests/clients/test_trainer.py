"""Hugging Face's Trainer: losses, weights and evaluations are those of the unconverted model."""

import copy

import numpy as np
import pytest
import torch
from models import VOCAB_SIZE, assert_same_tensors, build
from trainers import LENGTH, MICRO_BATCH, STEPS, Texts, trainer_of
from transformers import Trainer

from ds_minis import convert_to_mini_sequence, mini_sequence_report

CHUNKS = {"chunk_size": 7, "loss_chunk_size": 5}


@pytest.fixture(scope="module")
def plain():
    return build("gemma2")


@pytest.fixture
def pair(plain):
    """A converted and an unconverted copy of one model."""
    return convert_to_mini_sequence(copy.deepcopy(plain), CHUNKS), copy.deepcopy(plain)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_losses_and_final_weights_equal_those_of_the_unconverted_model(tmp_path, pair, gradient_checkpointing):
    start = {name: param.detach().clone() for name, param in pair[0].named_parameters()}
    losses, changes = [], []
    for model in pair:
        trainer = trainer_of(
            model,
            tmp_path,
            gradient_checkpointing=gradient_checkpointing,
            gradient_accumulation_steps=2,
            max_steps=STEPS,
            logging_steps=1,
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
        )
        assert trainer.model_accepts_loss_kwargs  # so num_items_in_batch reaches the loss
        result = trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log] + [result.training_loss])
        changes.append({name: param.detach() - start[name] for name, param in model.named_parameters()})
    assert len(set(losses[0])) == STEPS + 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_same_tensors(*changes, rtol=1e-4)
    assert_same_tensors(*(dict(model.named_parameters()) for model in pair))


def evaluate(model, folder, **settings) -> tuple[dict, np.ndarray]:
    seen = []

    def compute_metrics(prediction) -> dict:
        seen.append(prediction.predictions)
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    metrics = trainer_of(model, folder, compute_metrics, **settings).evaluate()
    return metrics, np.concatenate(seen)


def test_evaluation_with_metrics_gets_all_logits(tmp_path, pair):
    (metrics, logits), (expected_metrics, expected) = (evaluate(model, tmp_path) for model in pair)
    assert logits.shape == (5, LENGTH, VOCAB_SIZE)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    for key in ("eval_loss", "eval_accuracy"):
        assert metrics[key] == pytest.approx(expected_metrics[key], rel=1e-5)


def test_predict_gives_all_logits_without_metrics_too(tmp_path, pair):
    logits, expected = (trainer_of(model, tmp_path).predict(Texts(5)).predictions for model in pair)
    assert logits.shape == (5, LENGTH, VOCAB_SIZE)
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def rows_of_logits(monkeypatch) -> list[int]:
    """How many rows of logits each call of the LM head computes."""
    rows, linear = [], torch.nn.functional.linear

    def counting_linear(x, weight, bias=None):
        if len(weight) == VOCAB_SIZE:
            rows.append(x[..., 0].numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counting_linear)
    return rows


@pytest.mark.parametrize("settings", [{}, {"prediction_loss_only": True}])
def test_evaluation_for_the_loss_alone_computes_a_chunk_of_logits_at_a_time(tmp_path, pair, rows_of_logits, settings):
    found = []
    for model in pair:
        fields = set()
        model.register_forward_hook(lambda _, __, output, fields=fields: fields.update(output))
        rows_of_logits.clear()
        loss = trainer_of(model, tmp_path, **settings).evaluate()["eval_loss"]
        found.append((loss, max(rows_of_logits), fields))
    (loss, *ours), (expected_loss, *plain) = found
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert ours == [CHUNKS["loss_chunk_size"], {"loss"}]
    assert plain == [MICRO_BATCH * LENGTH, {"loss", "logits"}]


def test_training_after_an_evaluation_with_metrics_has_no_logits(tmp_path, pair, rows_of_logits):
    evaluate(pair[0], tmp_path)
    rows_of_logits.clear()
    trainer_of(pair[0], tmp_path, max_steps=1).train()
    assert max(rows_of_logits) == CHUNKS["loss_chunk_size"]


def accuracy(prediction) -> dict:
    tokens, labels = prediction.predictions[:, :-1], prediction.label_ids[:, 1:]
    return {"accuracy": (tokens == labels)[labels != -100].mean(), "shape": list(prediction.predictions.shape)}


PREPROCESS = {
    "argmax": lambda logits, labels: logits.argmax(dim=-1),
    "function": lambda logits, labels: torch.argmax(logits, -1),
    "run_clm.py": lambda logits, labels: (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1),
    "softmax first": lambda logits, labels: torch.softmax(logits.float(), dim=-1).argmax(-1),
}


@pytest.mark.parametrize("name", PREPROCESS)
def test_token_accuracy_holds_a_chunk_of_logits_at_a_time(tmp_path, pair, rows_of_logits, name):
    found = []
    for model in pair:
        trainer = trainer_of(model, tmp_path, accuracy)
        trainer.preprocess_logits_for_metrics = PREPROCESS[name]
        rows_of_logits.clear()
        metrics = trainer.evaluate()
        found.append((metrics["eval_loss"], metrics["eval_accuracy"], metrics["eval_shape"], max(rows_of_logits)))
        assert trainer.preprocess_logits_for_metrics is PREPROCESS[name]
    (loss, *ours, rows), (expected_loss, *expected, plain_rows) = found
    assert loss == pytest.approx(expected_loss, rel=1e-5) and ours == expected and expected[1] == [5, LENGTH]
    assert (rows, plain_rows) == (CHUNKS["loss_chunk_size"], MICRO_BATCH * LENGTH)


def label_log_probs(logits, labels):
    shifted = torch.log_softmax(logits[:, :-1], dim=-1)
    return shifted.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]


def top_three(logits, labels):
    return logits.topk(3, dim=-1).indices


def all_in_order(logits, labels):  # not recorded: computed in full
    return logits.sort(dim=-1).indices


@pytest.mark.parametrize(
    ("preprocess", "by_chunks"), [(label_log_probs, True), (top_three, True), (all_in_order, False)]
)
def test_what_preprocess_makes_of_the_logits_is_that_of_the_unconverted_model(
    tmp_path, pair, rows_of_logits, preprocess, by_chunks
):
    found = []
    for model in pair:
        rows_of_logits.clear()
        trainer = trainer_of(model, tmp_path)
        trainer.preprocess_logits_for_metrics = preprocess
        found.append(trainer.predict(Texts(5)).predictions)
        found.append(max(rows_of_logits) == CHUNKS["loss_chunk_size"])
    np.testing.assert_allclose(found[0], found[2], rtol=1e-4, atol=1e-5)
    assert (found[1], found[3]) == (by_chunks, False)


@pytest.mark.parametrize("preprocess", [label_log_probs, PREPROCESS["argmax"]])
def test_evaluation_in_mixed_precision_holds_a_chunk_of_float32_logits(tmp_path, pair, rows_of_logits, preprocess):
    found = []
    for model in pair:
        rows_of_logits.clear()
        trainer, dtypes = trainer_of(model, tmp_path, bf16=True), []
        trainer.preprocess_logits_for_metrics = lambda x, y, dtypes=dtypes: dtypes.append(x.dtype) or preprocess(x, y)
        found += [trainer.predict(Texts(5)).predictions, max(rows_of_logits), set(dtypes)]
    # A chunk of one token is multiplied by another kernel than eight are: a bfloat16 in between may be the next one.
    np.testing.assert_allclose(found[0], found[3], rtol=2e-3)
    assert found[1] == CHUNKS["loss_chunk_size"] < found[4] and found[2] == found[5] == {torch.float32}


def test_a_prediction_step_of_the_users_own_gets_the_logits_themselves(tmp_path, pair):
    class Summing(Trainer):
        def prediction_step(self, *args, **kwargs):
            loss, logits, labels = super().prediction_step(*args, **kwargs)
            self.sums.append(logits.float().sum().item())
            return loss, logits, labels

    found = []
    for model in pair:
        trainer = trainer_of(model, tmp_path, accuracy)
        trainer.__class__, trainer.sums = Summing, []
        trainer.preprocess_logits_for_metrics = PREPROCESS["argmax"]
        found.append([trainer.evaluate()["eval_accuracy"], *trainer.sums])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_label_smoothing_of_the_trainer_runs_by_chunks(tmp_path, pair, rows_of_logits):
    losses = []
    for model in pair:
        trainer = trainer_of(model, tmp_path, max_steps=2, label_smoothing_factor=0.1)
        losses.append(trainer.train().training_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert mini_sequence_report(pair[0]).last_loss == "by chunks (gather, sum)"


def test_a_cache_that_the_evaluation_does_not_look_at_brings_no_logits(tmp_path, pair, rows_of_logits):
    trainer = trainer_of(pair[0], tmp_path, accuracy, use_cache=True)
    trainer.preprocess_logits_for_metrics = PREPROCESS["argmax"]
    assert pair[0].config.use_cache
    trainer.evaluate()
    assert max(rows_of_logits) == CHUNKS["loss_chunk_size"]


def test_preprocess_gets_all_outputs_of_a_model_that_gives_more_than_logits(tmp_path, pair):
    found = []
    for model in pair:
        model.config.output_hidden_states = True
        seen = []
        trainer = trainer_of(model, tmp_path)
        trainer.preprocess_logits_for_metrics = lambda outputs, labels, seen=seen: (
            seen.append((len(outputs), len(outputs[1]), tuple(outputs[0].shape))) or outputs[0].argmax(-1)
        )
        found.append((seen, trainer.predict(Texts(5)).predictions.tolist()))
    assert found[0] == found[1] and found[0][0][0] == (2, 3, (MICRO_BATCH, LENGTH, VOCAB_SIZE))


def test_preprocess_is_called_where_a_trainer_has_a_prediction_step_of_its_own(tmp_path, pair):
    class Own(Trainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            return None, inputs["input_ids"].float(), inputs["labels"]

    trainer = trainer_of(pair[0], tmp_path, accuracy)
    trainer.__class__ = Own
    trainer.preprocess_logits_for_metrics = lambda logits, labels: logits + 1
    expected = torch.stack([Texts(5)[i]["input_ids"] for i in range(5)]).numpy() + 1
    np.testing.assert_array_equal(trainer.predict(Texts(5)).predictions, expected)
