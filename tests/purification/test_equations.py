"""The reverse process against diffusers' own scheduler, and the contracts of the purifier."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.nn.functional import mse_loss

from advdiff_cli.errors import AdvdiffError
from advdiff_cli.models.ddpm import read_ddpm
from advdiff_cli.purification.defended_classifier import DefendedClassifier
from advdiff_cli.purification.equations import forward_process, noise_levels, sampler_timesteps
from advdiff_cli.purification.purifier import DiffusionPurifier, NoisePurifier, linear_alpha_bar


@pytest.fixture(scope="module")
def model(ddpm):
    return read_ddpm(ddpm).requires_grad_(False)


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_ancestral_sampling_is_diffusers_loop_step_for_step(model, images):
    """Noised to the index that is denoised first, then DDPMScheduler.step at 39, 38, ..., 0."""
    purifier = DiffusionPurifier(model, 0.04)
    noise = torch.randn(len(images), *purifier.noise_shape(96, 96))
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    x = scheduler.add_noise(images * 2 - 1, noise[:, 0], torch.tensor([39]))
    with torch.inference_mode():
        for k, t in enumerate(range(39, -1, -1)):
            predicted = model(x, torch.full((len(x),), t))
            step = scheduler.step(predicted, t, x, return_dict=True)
            mean = _mean(scheduler, predicted, t, x)
            drawn = noise[:, k + 1] if t else torch.zeros_like(x)
            x = mean + scheduler._get_variance(t).sqrt() * drawn if t else step.prev_sample
        ours = purifier(images, noise)
    assert torch.allclose(ours, ((x + 1) / 2).clamp(0, 1), atol=2e-6)


def test_the_papers_model_is_sampled_as_its_code_does(ddpm, images):
    """Images in [0, 1] noised to index 40, then DDPMScheduler.step at 39, ..., 0: fields of its card."""
    model = read_ddpm(ddpm).requires_grad_(False)
    model.card = replace(model.card, data_range=(0.0, 1.0), index_offset=1)
    purifier = DiffusionPurifier(model, 0.04)
    noise = torch.randn(len(images), *purifier.noise_shape(96, 96))
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    x = scheduler.add_noise(images, noise[:, 0], torch.tensor([40]))
    with torch.inference_mode():
        for k, t in enumerate(scheduler.timesteps[-40:].tolist()):
            mean = _mean(scheduler, model(x, torch.full((len(x),), t)), t, x)
            x = mean + scheduler._get_variance(t).sqrt() * noise[:, k + 1] if t else mean
        ours = purifier(images, noise)
    assert torch.allclose(ours, x.clamp(0, 1), atol=2e-6)


def _mean(scheduler, predicted, t, x):
    """The mean of diffusers' step: what it returns when every normal number it draws is 0."""
    import diffusers.schedulers.scheduling_ddpm as module

    drawn = module.randn_tensor
    module.randn_tensor = lambda shape, **_: torch.zeros(shape)
    try:
        return scheduler.step(predicted, t, x).prev_sample
    finally:
        module.randn_tensor = drawn


def test_ddim_over_every_level_is_diffusers_loop(model, images):
    purifier = DiffusionPurifier(model, 0.02, "ddim")
    noise = torch.randn(len(images), *purifier.noise_shape(96, 96))
    scheduler = DDIMScheduler(num_train_timesteps=1000, set_alpha_to_one=True)
    scheduler.set_timesteps(1000)
    x = scheduler.add_noise(images * 2 - 1, noise[:, 0], torch.tensor([19]))
    with torch.inference_mode():
        for t in range(19, -1, -1):
            x = scheduler.step(model(x, torch.full((len(x),), t)), t, x).prev_sample
        ours = purifier(images, noise)
    assert torch.allclose(ours, ((x + 1) / 2).clamp(0, 1), atol=2e-6)


def test_the_schedule_is_diffusers_own():
    assert torch.equal(linear_alpha_bar(), DDPMScheduler(num_train_timesteps=1000).alphas_cumprod)


def test_indices():
    assert noise_levels(0.04, 1000) == 40
    assert sampler_timesteps(40, 40) == list(range(39, -1, -1))
    assert sampler_timesteps(100, 4) == [99, 66, 33, 0]
    assert sampler_timesteps(100, 1) == [99]
    assert noise_levels(1e-6, 1000) == 1
    for n in range(1, 60):
        for k in range(1, n + 1):
            indices = sampler_timesteps(n, k)
            assert len(set(indices)) == k, (n, k)
            assert indices == sorted(indices, reverse=True)
            assert indices[0] == n - 1
    with pytest.raises(ValueError, match="do not fit"):
        sampler_timesteps(4, 5)


def test_one_step_is_the_posterior_mean_for_both_samplers(model, images):
    ddpm, ddim = (DiffusionPurifier(model, 0.1, sampler, 1) for sampler in ("ddpm", "ddim"))
    noise = torch.randn(len(images), *ddpm.noise_shape(96, 96))
    alpha_bar = model.alpha_bar[99]
    x_t = forward_process(images * 2 - 1, noise[:, 0], alpha_bar)
    with torch.inference_mode():
        x_0 = (x_t - (1 - alpha_bar).sqrt() * model(x_t, torch.full((3,), 99))) / alpha_bar.sqrt()
        expected = (x_0.clamp(-1, 1) + 1) / 2
        assert torch.allclose(ddpm(images, noise), expected, atol=1e-6)
        assert torch.equal(ddpm(images, noise), ddim(images, noise))


@pytest.mark.parametrize("size", [(32, 32), (33, 50), (96, 96), (101, 64)])
def test_any_size_is_padded_and_cropped_back(model, size):
    purifier = DiffusionPurifier(model, 0.02, "ddim", 1)
    out = purifier(torch.rand(2, 3, *size))
    assert out.shape == (2, 3, *size)
    assert out.min() >= 0
    assert out.max() <= 1


@pytest.mark.parametrize(
    ("t_star", "steps", "message"),
    [
        (0.31, None, "above max_t = 0.3"),
        (0.0, None, "not in"),
        (1.2, None, "not in"),
        (0.01, 11, "the 10 noise levels"),
    ],
)
def test_settings_that_do_not_fit_are_refused(model, t_star, steps, message):
    with pytest.raises(AdvdiffError, match=message):
        DiffusionPurifier(model, t_star, "ddpm", steps)


def test_noise_defense_is_the_forward_process_clamped(images):
    purifier = NoisePurifier(linear_alpha_bar(), 0.04)
    noise = torch.randn(3, 1, 3, 96, 96)
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    expected = (scheduler.add_noise(images * 2 - 1, noise[:, 0], torch.tensor([39])) + 1) / 2
    assert torch.allclose(purifier(images, noise), expected.clamp(0, 1), atol=1e-6)


def test_rows_do_not_depend_on_their_company(model, images):
    purifier = DiffusionPurifier(model, 0.1, "ddpm", 3)
    noise = torch.randn(3, *purifier.noise_shape(96, 96))
    with torch.inference_mode():
        whole = purifier(images, noise)
        apart = torch.cat([purifier(images[i : i + 1], noise[i : i + 1]) for i in range(3)])
    assert torch.allclose(whole, apart, atol=1e-5)


def test_the_defended_classifier_is_differentiable(model, images):
    defended = DefendedClassifier(DiffusionPurifier(model, 0.1, "ddpm", 2), torch.nn.Sequential(torch.nn.Flatten()))
    x = images.clone().requires_grad_()
    noise = torch.randn(3, *defended.purifier.noise_shape(96, 96))
    mse_loss(defended(x, noise), torch.zeros(3, 3 * 96 * 96)).backward()
    assert x.grad.abs().sum() > 0
