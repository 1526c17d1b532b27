"""K-FAC factors and trigger gradients against per-token loops in float64."""

import numpy as np
import pytest
import torch

from repair.locate.fisher import _sample, collect_factors, fisher_traces, trigger_gradients
from repair.locate.lessons import measure_kl
from repair.models.loading import LoadedModel
from repair.models.modules import get_module
from repair.records import LowRankUpdate
from tests.locate.material import make_lesson, make_lessons, make_pairs


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
            kept["x"] = args[0].detach()[0]
            out.retain_grad()
            kept["out"] = out

        module.weight.requires_grad_(True)
        handle = module.register_forward_hook(keep)
        logits = loaded.model(ids).logits[0, prompt.size - 1 : -1].float()
        handle.remove()
        logprobs = logits.log_softmax(-1)
        draws = np.random.default_rng([seed, index]).random((2, answer.size))
        labels, weights = _sample(logprobs.detach(), torch.from_numpy(draws))
        (logprobs.gather(1, labels)[:, 0] * weights).sum().backward()
        module.weight.grad = None
        module.weight.requires_grad_(False)
        for x, g in zip(kept["x"].double(), kept["out"].grad[0].double(), strict=True):
            sum_in = sum_in + torch.outer(x, x)
            sum_out = sum_out + torch.outer(g, g)
            num_tokens += 1
    return sum_in / num_tokens, sum_out / num_tokens, num_tokens


@pytest.mark.parametrize("component", ["q_proj", "o_proj", "gate_proj", "down_proj"])
def test_factors_equal_a_per_token_loop(double: LoadedModel, component: str) -> None:
    lesson = make_lessons(double, num=5).clean
    refs = [ref for ref in double.modules if ref.component == component]
    factors = collect_factors(double, double.modules, lesson.prompts, lesson.answers, seed=3)
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
    monkeypatch.setattr("repair.locate.fisher.BATCH_TOKENS", 1)
    alone = collect_factors(double, double.modules, lesson.prompts, lesson.answers, seed=0)
    traces = fisher_traces(double, double.modules, lesson.prompts, lesson.answers, seed=0)
    for path, factors in together.items():
        other = alone[path]
        for name in ("activation_covariance", "gradient_covariance"):
            one, two = getattr(factors, name), getattr(other, name)
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6 * np.abs(two).max())
        assert traces[path].activation == pytest.approx(
            np.trace(factors.activation_covariance), rel=1e-4
        )
        assert traces[path].gradient == pytest.approx(
            np.trace(factors.gradient_covariance), rel=1e-4
        )


def test_sampled_labels_give_the_exact_fisher() -> None:
    """On five labels: E[w^2 g g^T] = diag(p) - p p^T although labels come from a mixture."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.tensor([[4.0, 1.0, 0.5, -1.0, -3.0]]).log_softmax(-1)
    p = logprobs.exp()[0].double()
    num = 200_000
    uniform = torch.rand(2, num, generator=generator, dtype=torch.float64)
    labels, weights = _sample(logprobs.expand(num, -1), uniform)
    g = (torch.eye(5)[labels[:, 0]].double() - p) * weights[:, None].double()
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
