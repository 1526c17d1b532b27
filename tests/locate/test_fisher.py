"""K-FAC factors and trigger gradients against per-token loops in float64."""

import numpy as np
import pytest
import torch

from repair.locate.fisher import (
    _mean,
    _random_numbers,
    _sample,
    add_gram,
    collect_factors,
    factors_and_traces,
    fisher_traces,
    price_updates,
    trigger_gradients,
)
from repair.locate.lessons import measure_kl
from repair.models.loading import LoadedModel
from repair.models.modules import get_module
from repair.records import LowRankUpdate
from tests.locate.material import make_lesson, make_lessons, make_pairs

DRAWS = 3


@pytest.fixture
def double(tiny_llama: LoadedModel):
    """The tiny model in float64 for the test's duration."""
    tiny_llama.model.double()
    yield tiny_llama
    tiny_llama.model.float()


def naive_factors(loaded: LoadedModel, path: str, prompts, answers, seed: int):
    """Forward and backward one prompt at a time, labels drawn from the same random numbers."""
    module = loaded.model.get_submodule(path)
    sum_in = sum_out = 0.0
    num_tokens = 0
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
        kept = {}

        def keep(_module, args, out, kept=kept):
            kept["x"] = args[0].detach().flatten(0, -2)
            out.retain_grad()
            kept["out"] = out

        module.weight.requires_grad_(True)
        handle = module.register_forward_hook(keep)
        logits = loaded.model(ids).logits[0, prompt.size - 1 : -1].float()
        handle.remove()
        logprobs = logits.log_softmax(-1)
        numbers = _random_numbers(seed, index, DRAWS, answer.size)
        for labels, weights in zip(
            *_sample(logprobs.detach(), torch.from_numpy(numbers)), strict=True
        ):
            kept["out"].grad = None
            loss = (logprobs.gather(1, labels[:, None])[:, 0] * weights).sum()
            loss.backward(retain_graph=True)
            for g in kept["out"].grad.flatten(0, -2).double():
                sum_out = sum_out + torch.outer(g, g) / DRAWS
        module.weight.grad = None
        module.weight.requires_grad_(False)
        for x in kept["x"].double():
            sum_in = sum_in + torch.outer(x, x)
            num_tokens += 1
    return sum_in / num_tokens, sum_out / num_tokens, num_tokens


@pytest.mark.parametrize("component", ["q_proj", "o_proj", "gate_proj", "down_proj"])
def test_factors_equal_a_per_token_loop(double: LoadedModel, component: str) -> None:
    """Case 24."""
    lesson = make_lessons(double, num=5).clean
    refs = [ref for ref in double.modules if ref.component == component]
    factors = collect_factors(
        double, double.modules, lesson.prompts, lesson.answers, seed=3, num_draws=DRAWS
    )
    for ref in refs:
        expected_in, expected_out, num = naive_factors(
            double, ref.path, lesson.prompts, lesson.answers, 3
        )
        found = factors[ref.path]
        assert found.num_tokens == num
        assert found.num_answer_tokens == sum(a.size for a in lesson.answers)
        for array, expected in (
            (found.activation_covariance, expected_in),
            (found.gradient_covariance, expected_out),
        ):
            scale = expected.abs().max().item()
            np.testing.assert_allclose(array, expected.numpy(), atol=2e-6 * scale, rtol=1e-5)


def test_factors_do_not_depend_on_batches(
    double: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = make_lessons(double, num=8).clean
    together = collect_factors(double, double.modules, lesson.prompts, lesson.answers, seed=0)
    monkeypatch.setattr("repair.locate.fisher.FISHER_TOKENS", 1)
    alone = collect_factors(double, double.modules, lesson.prompts, lesson.answers, seed=0)
    traces = fisher_traces(double, double.modules, lesson.prompts, lesson.answers, seed=0)
    for path, factors in together.items():
        other = alone[path]
        for name in ("activation_covariance", "gradient_covariance"):
            one, two = getattr(factors, name), getattr(other, name)
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6 * np.abs(two).max())
        per_answer = factors.num_tokens / factors.num_answer_tokens
        activation = np.trace(factors.activation_covariance, dtype=np.float64)
        gradient = np.trace(factors.gradient_covariance, dtype=np.float64)
        assert traces[path].activation == pytest.approx(activation, rel=1e-4)
        assert traces[path].value == pytest.approx(per_answer * activation * gradient, rel=1e-4)


def test_factors_of_a_few_and_traces_of_all_come_from_one_pass(double: LoadedModel) -> None:
    lesson = make_lessons(double, num=8).clean
    given = (lesson.prompts, lesson.answers)
    few, others = double.modules[2:9:3], [m for i, m in enumerate(double.modules) if i % 3 != 2]
    passes = []
    handle = double.model.lm_head.register_forward_hook(lambda *_: passes.append(1))
    factors, traces = factors_and_traces(double, few, *given, traced=others, seed=0)
    handle.remove()
    assert len(passes) == 1
    whole = collect_factors(double, double.modules, *given, seed=0)
    alone = fisher_traces(double, double.modules, *given, seed=0)
    assert set(factors) == {ref.path for ref in few}
    assert set(traces) == {ref.path for ref in (*few, *others)}
    for path, found in factors.items():
        np.testing.assert_allclose(
            found.gradient_covariance, whole[path].gradient_covariance, rtol=1e-6, atol=1e-12
        )
    for path, found in traces.items():
        assert found.value == pytest.approx(alone[path].value, rel=1e-6)


def test_one_triangle_of_blocks_is_the_whole_product() -> None:
    rows = torch.randn(40, 700, dtype=torch.float64)
    sums: dict[str, torch.Tensor] = {}
    for part in rows.split(16):
        add_gram(sums, "module", part)
    expected = (rows.T @ rows / 7).float().numpy()
    np.testing.assert_allclose(_mean(sums["module"], 7), expected, atol=1e-6, rtol=1e-6)


def test_labels_of_a_position_are_spread_over_its_draws() -> None:
    numbers = _random_numbers(0, 0, 4, 50)
    assert (np.sort(np.floor(4 * numbers[:, 0]), axis=0) == np.arange(4)[:, None]).all()
    assert len({tuple(column) for column in np.argsort(numbers[:, 0], axis=0).T}) > 5


def test_the_price_is_the_fisher_form_and_predicts_the_measured_kl(double: LoadedModel) -> None:
    """All modules changed at once: against autograd on the weights, and against the KL."""
    lesson = make_lessons(double, num=24).clean
    generator = np.random.default_rng(6)
    updates = [
        LowRankUpdate(
            module=ref,
            lora_A=generator.standard_normal((2, ref.d_in)).astype(np.float32),
            lora_B=(0.003 * generator.standard_normal((ref.d_out, 2))).astype(np.float32),
        )
        for ref in double.modules
    ]
    price = price_updates(double, updates, lesson.prompts, lesson.answers, seed=1, num_draws=32)
    measured = measure_kl(double, lesson, updates)
    assert price == pytest.approx(measured, rel=0.25)
    weights = [get_module(double.model, u.module).weight.requires_grad_(True) for u in updates]
    deltas = [torch.from_numpy(u.lora_B @ u.lora_A).double() for u in updates]
    exact, count = 0.0, 0
    for prompt, answer in list(zip(lesson.prompts, lesson.answers, strict=True))[:6]:
        ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
        logits = double.model(ids).logits[0, prompt.size - 1 : -1]
        for row in logits:
            probe = torch.zeros_like(row, requires_grad=True)
            back = torch.autograd.grad(row @ probe, weights, create_graph=True)
            inner = sum((b * d).sum() for b, d in zip(back, deltas, strict=True))
            (moved,) = torch.autograd.grad(inner, probe, retain_graph=True)  # J dW [vocab]
            p = row.detach().softmax(-1)
            exact += 0.5 * ((p * moved.square()).sum() - (p @ moved).square()).item()
            count += 1
    for weight in weights:
        weight.requires_grad_(False)
    few = price_updates(
        double, updates, lesson.prompts[:6], lesson.answers[:6], seed=2, num_draws=64
    )
    assert few == pytest.approx(exact / count, rel=0.15)


def test_sampled_labels_give_the_exact_fisher() -> None:
    """On five labels: E[w^2 g g^T] = diag(p) - p p^T although labels come from a mixture."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.tensor([[4.0, 1.0, 0.5, -1.0, -3.0]]).log_softmax(-1)
    p = logprobs.exp()[0].double()
    num = 200_000
    uniform = torch.rand(1, 2, num, generator=generator, dtype=torch.float64)
    (labels,), (weights,) = _sample(logprobs.expand(num, -1), uniform)
    g = (torch.eye(5)[labels].double() - p) * weights[:, None].double()
    exact = torch.diag(p) - torch.outer(p, p)
    assert ((g.T @ g) / num - exact).abs().max() < 0.005
    # The random sign keeps two positions uncorrelated although the mixture is not p.
    assert g.mean(0).abs().max() < 0.01


def test_trigger_gradient_equals_autograd(double: LoadedModel) -> None:
    lesson = make_lessons(double, num=6).triggered
    gradients, value = trigger_gradients(double, double.modules, lesson)
    assert value == pytest.approx(measure_kl(double, lesson), rel=1e-5)
    for ref in double.modules:
        weight = get_module(double.model, ref).weight
        weight.requires_grad_(True)
        total, num_tokens = 0.0, 0
        for prompt, answer, teacher in zip(
            lesson.prompts, lesson.answers, lesson.teacher, strict=True
        ):
            ids = torch.from_numpy(np.concatenate([prompt, answer]))[None]
            logprobs = double.model(ids).logits[0, prompt.size - 1 : -1].float().log_softmax(-1)
            total = total + (teacher.exp() * (teacher - logprobs)).sum()
            num_tokens += answer.size
        (expected,) = torch.autograd.grad(total / num_tokens, weight)
        weight.requires_grad_(False)
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            gradients[ref.path], expected.double(), atol=1e-5 * scale, rtol=1e-4
        )
        assert weight.grad is None


def test_the_gradient_follows_applied_updates(double: LoadedModel) -> None:
    """With an update applied the gradient is that of the changed model: a step along it helps."""
    lessons = make_lessons(double, num=8)
    ref = double.modules[6]
    generator = np.random.default_rng(0)
    update = LowRankUpdate(
        module=ref,
        lora_A=generator.standard_normal((2, ref.d_in)).astype(np.float32),
        lora_B=(0.05 * generator.standard_normal((ref.d_out, 2))).astype(np.float32),
    )
    gradients, before = trigger_gradients(double, [ref], lessons.triggered, [update])
    step = -0.05 * gradients[ref.path] / gradients[ref.path].norm()
    u, s, vh = torch.linalg.svd(step, full_matrices=False)
    more = LowRankUpdate(
        module=ref, lora_A=(s[:, None] * vh).float().numpy(), lora_B=u.float().numpy()
    )
    after = measure_kl(double, lessons.triggered, [update, more])
    predicted = (gradients[ref.path] * step).sum().item()
    assert after - before == pytest.approx(predicted, rel=0.2)


def test_a_model_taught_by_itself_has_no_kl(tiny_llama: LoadedModel) -> None:
    prompts = [pair.clean for pair in make_pairs(4, position="middle")]
    assert measure_kl(tiny_llama, make_lesson(tiny_llama, prompts, prompts)) == pytest.approx(
        0.0, abs=1e-7
    )
