"""What may be kept, as learned from steps that kept nothing: never more than leaves room for the step itself."""

import gc
import random

import pytest
import torch

from ds_minis.memory import device_memory
from ds_minis.memory.device_memory import CudaMemory, ProcessMemory
from ds_minis.memory.learned_memory import RESERVE, LearnedMemory


class FakeMemory:
    """Memory that a test allocates from."""

    def __init__(self, total=1000.0):
        self.total, self.used, self.most, self.reads = total, 0.0, 0.0, 0

    def use(self, num_bytes):
        self.used += num_bytes
        self.most = max(self.most, self.used)

    def in_use(self):
        self.reads += 1
        return self.used

    def peak(self):
        return self.most

    def usable(self):
        return self.total


def learning(total=1000.0):
    memory = FakeMemory(total)
    return memory, LearnedMemory(memory)


def step(memory, learned, transient, batch=1, length=10):
    """A forward pass and its backward; gives what could have been kept."""
    forward_pass, left = learned.begin(batch, length)
    memory.use(transient)
    memory.use(-transient)
    forward_pass.done()
    return left


def test_a_step_of_more_tokens_than_any_before_is_measured():
    memory, learned = learning()
    memory.use(100)
    assert step(memory, learned, 200) is None
    assert step(memory, learned, 200) == step(memory, learned, 90, length=9) == 900 - 300
    assert step(memory, learned, 400, length=20) is None
    assert step(memory, learned, 400, length=20) == 900 - 500
    assert step(memory, learned, 200) == 900 - 300  # of its own length
    assert step(memory, learned, 200, length=11) == 900 - 500
    # As many tokens in longer sequences have more pairs.
    assert step(memory, learned, 400, batch=2, length=10) == 900 - 500
    assert step(memory, learned, 100, batch=4, length=10) is None
    assert step(memory, learned, 100, batch=1, length=30) is None


def test_what_others_use_now_counts():
    memory, learned = learning()
    step(memory, learned, 200)
    memory.use(20)
    assert step(memory, learned, 200) == 900 - 220


def test_states_of_the_optimizer_count_and_its_own_peak_does_not():
    memory, learned = learning()
    memory.use(100)
    step(memory, learned, 300)
    memory.use(700)
    memory.use(-400)  # states of 300
    assert step(memory, learned, 300) == 900 - 700


def test_gradients_that_are_there_may_be_gone_in_the_next_step():
    """Also where states have come since."""
    memory, learned = learning()
    memory.use(100)
    first, _ = learned.begin(1, 10)
    memory.use(200 + 150)
    memory.use(-200)  # gradients of 150 stay
    first.done()
    step(memory, learned, 300, length=15)  # the longer batch is first met when they are there
    memory.use(-150 + 90)
    assert step(memory, learned, 450, length=15) == 900 - 190 - 300 - 150


def test_a_peak_before_hides_a_steps_own():
    memory, learned = learning()
    memory.use(900)
    memory.use(-800)
    assert step(memory, learned, 100) is None and step(memory, learned, 100) == 0
    memory.most = memory.used  # set back by the user
    assert step(memory, learned, 150, length=15) is None
    assert step(memory, learned, 150, length=15) == 900 - 250
    memory.use(800)
    memory.use(-800)
    assert step(memory, learned, 200, length=20) is None
    assert step(memory, learned, 200, length=20) == pytest.approx(900 - 100 - 150 * (20 / 15) ** 2)


def test_statistics_set_back_during_a_step_teach_nothing():
    memory, learned = learning()
    memory.use(500)
    memory.use(-400)
    forward_pass, _ = learned.begin(1, 10)
    memory.most = memory.used
    memory.use(50)
    forward_pass.done()
    assert step(memory, learned, 50) is None


def test_of_several_forward_passes_at_once_the_last_keeps_something():
    """The others cannot know how much more the next ones will need."""
    memory, learned = learning()
    for known in (False, True, True):
        first, left = learned.begin(1, 10)
        memory.use(100)
        second, left_of_second = learned.begin(1, 10)
        memory.use(150)
        assert left is None and left_of_second == (900 - 250 if known else None)
        memory.use(-150)
        second.done()
        memory.use(-100)
        first.done()
    assert learned.num_waiting == 0
    memory.use(50)
    first, _ = learned.begin(1, 11)
    _, left = learned.begin(1, 10)
    assert left is None  # more tokens wait than then


def test_while_one_is_measured_the_others_keep_nothing():
    _, learned = learning()
    for length in (10, 20):
        first, _ = learned.begin(1, length)
        second, left = learned.begin(1, 10)
        assert left is None
        second.done()
        first.done()


def test_a_forward_pass_without_a_backward_teaches_nothing():
    memory, learned = learning()
    forward_pass, _ = learned.begin(1, 10)
    del forward_pass
    gc.collect()
    assert learned.num_waiting == 0 and step(memory, learned, 100) is None and step(memory, learned, 100) == 800


def test_a_second_backward_counts_no_more():
    memory, learned = learning()
    forward_pass, _ = learned.begin(1, 10)
    memory.use(100)
    memory.use(-100)
    forward_pass.done()
    memory.use(500)
    memory.use(-500)
    forward_pass.done()
    assert step(memory, learned, 100) == 800


@pytest.mark.parametrize("seed", range(40))
def test_what_is_in_use_and_kept_and_what_a_step_needs_never_exceed_what_there_is(seed):
    """With accumulation, states that come after the first step, several passes at once, and an optimizer with a peak."""
    draw = random.Random(seed)
    memory, learned = learning(total=draw.choice([3000.0, 6000.0, 20000.0]))
    weights, states = draw.uniform(100, 400), draw.uniform(0, 800)
    accumulation, passes = draw.choice([1, 1, 3]), draw.choice([1, 1, 2])
    per_token, per_pair = draw.uniform(0.5, 3), draw.choice([0, 0.01])
    memory.use(weights)
    memory.use(draw.choice([0, 900]))
    memory.use(weights - memory.used)
    gradients, has_states, kept_steps, num_bytes = 0.0, False, 0, 0.0
    for number in range(60):
        started = []
        for _ in range(passes):
            batch, length = draw.choice([1, 1, 2]), min(200, int(draw.lognormvariate(3.5, 0.8)) + 1)
            need = per_token * batch * length + per_pair * batch * length * length
            forward_pass, left = learned.begin(batch, length)
            num_bytes = 0.0 if left is None else max(0.0, left) * draw.uniform(0.5, 1)
            memory.use(0.3 * need + num_bytes)
            started.append((forward_pass, need, num_bytes))
            kept_steps += num_bytes > 0
        for forward_pass, need, kept in reversed(started):
            memory.use(0.7 * need + max(0.0, weights - gradients))  # gradients come in the first backward
            assert not kept or memory.used <= (1 - RESERVE) * memory.total + 1e-6
            gradients = weights
            memory.use(-need - kept)
            forward_pass.done()
        if number % accumulation == accumulation - 1:
            memory.use(states * (2 if has_states else 3))
            memory.use(-states * 2 - gradients)
            has_states, gradients = True, 0.0
    assert kept_steps


def test_statistics_of_cuda(monkeypatch):
    stats = {"allocated_bytes": {"all": {"current": 3, "peak": 7}}, "reserved_bytes": {"all": {"current": 5}}}
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20, 40))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 1.0, raising=False)
    memory = CudaMemory(torch.device("cuda", 0))
    assert (memory.in_use(), memory.peak(), memory.usable()) == (3, 7, 25)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.5)
    assert memory.usable() == 20
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: "pluggable")
    assert device_memory.memory_of(torch.device("cuda", 0)) is None


def test_memory_of_this_process(tmp_path, monkeypatch):
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 8 kB\n")
    (tmp_path / "proc" / "self" / "status").write_text("Name: x\nVmHWM:\t   5 kB\nVmRSS:\t   2 kB\n")
    monkeypatch.setattr(device_memory, "num_local_ranks", lambda: 4)
    memory = ProcessMemory(tmp_path)
    assert (memory.in_use(), memory.peak(), memory.usable()) == (2 * 1024, 5 * 1024, 4 * 1024)
    own = device_memory.memory_of(torch.device("cpu"))
    assert 0 < own.in_use() <= own.peak() and own.usable() > own.in_use()
    assert device_memory.memory_of(torch.device("meta")) is None
