"""The networks of the frozen encoders: published towers without what language models do not read, and a seeded one for the demo."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ClipPatches(nn.Module):
    """A CLIP vision model without its last layer: the patches that the layer before last gives, the class token taken off."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (I, 3, H, W) -> features (I, F, E), the same bits in any batch."""
        return self.model(pixel_values=pixels).last_hidden_state[:, 1:]


class SiglipPatches(nn.Module):
    """A SigLIP vision model without its last layer, its final norm and its pooling: the patches that the layer before last gives."""

    def __init__(self, model: nn.Module):
        super().__init__()
        inner = getattr(model, "vision_model", model)
        self.embeddings, self.layers = inner.embeddings, inner.encoder

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(inputs_embeds=self.embeddings(pixels)).last_hidden_state


class WhisperStates(nn.Module):
    """Whisper's encoder: its last hidden state, 50 features a second of the padded window."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, mels: Tensor) -> Tensor:
        return self.model(input_features=mels).last_hidden_state


class SeededPatches(nn.Module):
    """The demo's encoder: fixed random filters on 4 x 4 tiles of a small picture, so that colour, shape and place can be read off linearly.

    Each tile gives the mean rectified answer of 32 colour filters and of 96 filters on the foreground (how far a pixel is from the picture's
    median colour, so that a shape looks the same in every colour), and the row and column of the tile, one in four.
    """

    side, colours, forms = 4, 32, 96

    def __init__(self, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def filters(count: int, channels: int, edge: int, bias: float) -> nn.Conv2d:
            """Random filters of unit norm."""
            layer = nn.utils.skip_init(
                nn.Conv2d, channels, count, edge, stride=3, padding=edge // 2
            )  # the global generator stays untouched
            weight = torch.randn(layer.weight.shape, generator=generator)
            weight = (
                weight if channels > 1 else weight - weight.mean((1, 2, 3), keepdim=True)
            )  # a form is where the foreground changes
            layer.weight.data = weight / weight.flatten(1).norm(dim=1)[:, None, None, None]
            layer.bias.data = (2 * torch.rand(count, generator=generator) - 1) * bias
            return layer

        self.colour, self.form = filters(self.colours, 3, 3, 0.3), filters(self.forms, 1, 9, 0.5)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (I, 3, H, W) -> features (I, F, E), the same bits in any batch."""
        exact = pixels.double()  # float32 rounds otherwise in another batch; float64 and 8 bits after the point leave no trace of it
        median = exact.flatten(2).median(dim=2).values[:, :, None, None]
        distance = (exact - median).abs().amax(1, keepdim=True)  # (I, 1, H, W)
        foreground = distance / distance.amax((2, 3), keepdim=True).clamp(min=1e-6)
        answers = []
        for layer, seen in ((self.colour, exact), (self.form, 2 * foreground - 1)):
            answer = F.conv2d(
                seen, layer.weight.double(), layer.bias.double(), layer.stride, layer.padding
            ).relu()
            answers.append(F.adaptive_avg_pool2d(answer, self.side).flatten(2).transpose(1, 2))
        colour, form = answers  # (I, 16, filters)
        form = 4 * form - 3 * form.mean(
            2, keepdim=True
        )  # what sets the filters apart says the shape, more than what all see alike
        rows = 4 * torch.eye(self.side, dtype=exact.dtype, device=exact.device) - 1
        place = torch.cat(
            [rows.repeat_interleave(self.side, 0), rows.repeat(self.side, 1)], dim=1
        )  # (16, 8)
        features = torch.cat(
            [16 * colour - 4, 4 * form - 1, place.expand(len(exact), -1, -1)], dim=2
        )
        return (
            (features * 256).round().div(256).to(pixels.dtype)
        )  # (I, 16, 136), spread as wide as a projector's first layer likes
