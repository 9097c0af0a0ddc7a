"""Names and shapes of the official state dicts, from rules, and random weights of them, for the tests.

Facts checked against random weights of the official implementations; none of their code is here.
"""

import torch


def conv(name, out_channels, in_channels, kernel=1, bias=True):
    shapes = {f"{name}.weight": (out_channels, in_channels, kernel, kernel)}
    return shapes | ({f"{name}.bias": (out_channels,)} if bias else {})


def numbered(prefix, count, block):
    return {f"{prefix}.{i}.{name}": shape for i in range(count) for name, shape in block.items()}


# --- NAFNet ---------------------------------------------------------------------------------------------------------


def nafnet_block(c):
    shapes = {"beta": (1, c, 1, 1), "gamma": (1, c, 1, 1)}
    for norm in ("norm1", "norm2"):
        shapes |= {f"{norm}.weight": (c,), f"{norm}.bias": (c,)}
    shapes |= conv("conv1", 2 * c, c) | conv("conv2", 2 * c, 1, 3) | conv("conv3", c, c) | conv("sca.1", c, c)
    return shapes | conv("conv4", 2 * c, c) | conv("conv5", c, c)


def nafnet_shapes(width=32, encoder=(1, 1, 1, 28), middle=1, decoder=(1, 1, 1, 1), num_channels=3):
    shapes, c = conv("intro", width, num_channels, 3), width
    for i, count in enumerate(encoder):
        shapes |= numbered(f"encoders.{i}", count, nafnet_block(c)) | conv(f"downs.{i}", 2 * c, c, 2)
        c *= 2
    shapes |= numbered("middle_blks", middle, nafnet_block(c))
    for i, count in enumerate(decoder):
        shapes |= conv(f"ups.{i}.0", 2 * c, c, bias=False)
        c //= 2
        shapes |= numbered(f"decoders.{i}", count, nafnet_block(c))
    return shapes | conv("ending", num_channels, c, 3)


# --- Restormer ------------------------------------------------------------------------------------------------------


def restormer_block(c, heads, ffn, bias, norm_bias):
    hidden = int(c * ffn)
    shapes = {"attn.temperature": (heads, 1, 1)}
    for norm in ("norm1", "norm2"):
        shapes |= {f"{norm}.body.weight": (c,)} | ({f"{norm}.body.bias": (c,)} if norm_bias else {})
    shapes |= conv("attn.qkv", 3 * c, c, bias=bias) | conv("attn.qkv_dwconv", 3 * c, 1, 3, bias)
    shapes |= conv("attn.project_out", c, c, bias=bias) | conv("ffn.project_in", 2 * hidden, c, bias=bias)
    return shapes | conv("ffn.dwconv", 2 * hidden, 1, 3, bias) | conv("ffn.project_out", c, hidden, bias=bias)


def restormer_shapes(
    width=48,
    blocks=(4, 6, 6, 8),
    refinement=4,
    heads=(1, 2, 4, 8),
    ffn=2.66,
    bias=False,
    norm_bias=True,
    num_channels=3,
    num_output_channels=3,
    dual_pixel=False,
):
    def stage(name, channels, level, count=None):
        block = restormer_block(channels, heads[level - 1], ffn, bias, norm_bias)
        return numbered(name, blocks[level - 1] if count is None else count, block)

    c1, c2, c3, c4 = (width * 2**level for level in range(4))
    shapes = conv("patch_embed.proj", c1, num_channels, 3, bias=False)
    for level, c in ((1, c1), (2, c2), (3, c3)):
        shapes |= stage(f"encoder_level{level}", c, level)
        shapes |= conv(f"down{level}_{level + 1}.body.0", c // 2, c, 3, bias=False)
    shapes |= stage("latent", c4, 4)
    for level, c in ((3, c3), (2, c2)):
        shapes |= conv(f"up{level + 1}_{level}.body.0", 4 * c, 2 * c, 3, bias=False)
        shapes |= conv(f"reduce_chan_level{level}", c, 2 * c, bias=bias) | stage(f"decoder_level{level}", c, level)
    shapes |= conv("up2_1.body.0", 4 * c1, c2, 3, bias=False)
    shapes |= stage("decoder_level1", 2 * c1, 1) | stage("refinement", 2 * c1, 1, refinement)
    shapes |= conv("skip_conv", 2 * c1, c1, bias=bias) if dual_pixel else {}
    return shapes | conv("output", num_output_channels, 2 * c1, 3, bias)


def random_weights(shapes, seed=0):
    """Weights of the size that layers have at first; temperatures and the weights of norms about 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        about_one = "temperature" in name or (len(shape) == 1 and name.endswith("weight"))
        fan_in = torch.Size(shape[1:]).numel()
        weights[name] = 1 + noise / 4 if about_one else noise / max(fan_in, 4) ** 0.5
    return weights


# --- what was published ----------------------------------------------------------------------------------------------

SIDD = {"encoder": (2, 2, 4, 8), "middle": 12, "decoder": (2, 2, 2, 2)}

PUBLISHED_NAFNETS = {
    "GoPro, width 32": ({}, 17_111_907),
    "GoPro and REDS, width 64": ({"width": 64}, 67_888_835),
    "SIDD, width 32": (SIDD, 29_159_715),
    "SIDD, width 64": ({"width": 64, **SIDD}, 115_982_915),
}
"""Arguments of `nafnet_shapes`, and parameters."""

PUBLISHED_RESTORMERS = {
    "deraining, motion and defocus deblurring": ({}, 26_126_644),
    "denoising in colour": ({"norm_bias": False}, 26_111_668),
    "denoising of grey images": (
        {"norm_bias": False, "num_channels": 1, "num_output_channels": 1}, 26_109_076),
    "defocus deblurring of dual-pixel images": ({"num_channels": 6, "dual_pixel": True}, 26_132_548),
}  # fmt: skip
"""Arguments of `restormer_shapes`, and parameters."""
