"""The cases that `make test` runs: small ones that take every kernel along every path. By op, as `str(case)`."""

# The types of those cases. What is float16's own are its conversions in csrc/common, which two small ops show.
DTYPES = ("torch.float32", "torch.bfloat16", "torch.uint8")
WITH_FLOAT16 = ("cosine_align", "global_norm")

# A thread keeps another number of vectors for each, for the last none.
ADALN_WIDTHS = (768, 1024, 1152, 2048, 4096, 4104)

CHOSEN = {
    "adaln": [
        "0x4x8-contiguous-chunk",
        "7x1x3-contiguous-chunk",
        "3x33x33-transposed-chunk-offset",
        "3x32x65-offset-chunk-transposed-float_modulation",
        "2x9x128-chunk-contiguous-alone",
        "5x31x96-contiguous-chunk",
        "3x33x33-transposed-chunk-offset-rms",
        "1x3x768-contiguous-chunk-rms",
        *(f"1x3x{width}-contiguous-chunk" for width in ADALN_WIDTHS),
        *(f"1x3x{width}-contiguous-chunk-float_modulation" for width in ADALN_WIDTHS),
    ],
    "adamw_ema": [
        "0-contiguous-ema-norm_1.0_0.5",
        "7-scalar-0x3-5x1x2-offset-ema-norm_1.0_0.5",
        "7-scalar-0x3-5x1x2-contiguous-no_ema-norm_1.0_0.5",
        "8x4x3x3-4x8x1x1-channels_last-ema-norm_1.0_0.5",
        "33-65-contiguous-ema-norm_None_0.5",
        "33-65-contiguous-ema-norm_1.0_2.0",
        "1023-1025-contiguous-offset-ema-norm_1.0_0.5",
        "8193-offset-contiguous-no_ema-norm_1.0_0.5",
        "0-1-2-65_tensors-offset-contiguous-ema-norm_1.0_0.5",
    ],
    "center_crop": [
        "1x1-to-1-packed-normalised",
        "1x40,40x1-to-8-packed-normalised",
        "64x64,64x100-to-64-window-normalised",
        "15x16,16x15-to-7-window-normalised",
        "17x33,33x17,31x47-to-16-packed-normalised",
        "37x43,45x39-to-116-packed",
        "128x128,129x129-to-64-planes-normalised",
    ],
    "cosine_align": [
        "0x4x8-contiguous-none",
        "7x3-contiguous-none",
        "3x5x33-transposed-none",
        "3x5x64-offset-none",
        "3x5x65-offset-contiguous-none",
        "3x5x66-padded-none",
        "2x9x128-chunk-offset-none",
        "2x9x256-contiguous-none",
        "40x3-contiguous-none-margin0.0",
        "4x16x65-chunk-transposed-sample-margin0.6",
        "2x9x96-contiguous-chunk-mean-margin0.5",
    ],
    "global_norm": [
        "0-contiguous-1",
        "31-33x3-contiguous-1",
        "32769-offset-1",
        "40000-5-5-202_tensors-contiguous-1",
    ],
    # In one launch, then in three.
    "group_norm_silu": [
        "0x4x3x3-2groups-channels_last",
        "3x8x1x1-2groups-channels_last",
        "2x9x1x5-3groups-channels_last_chunk-chunk-contiguous-residual",
        "2x7x5x3-7groups-channels_last",
        "2x8x6x6-2groups-channels_last_chunk-channels_last",
        "2x6x4x5-3groups-channels_last-offset-residual-norm",
        "2x64x4x4-2groups-channels_last-norm",
        "2x64x4x4-32groups-channels_last-residual",
        "2x128x16x17-32groups-channels_last",
        "3x6x5x7-2groups-contiguous-residual",
        "2x33x9x4-1groups-channels_last-norm",
        "1x3x33x35-3groups-offset-channels_last",
        "2x640x5x6-2groups-channels_last",
        "1x640x9x8-2groups-channels_last-residual-norm",
        "1x1032x3x5-4groups-channels_last",
        "1x2049x2x2-3groups-channels_last-offset-residual",
    ],
    "noise_inject": [
        "0x4x8x8-contiguous",
        "5x3x5x7-contiguous",
        "2x7x13x1-channels_last-chunk-transposed",
        "3x4x8x8-contiguous-given_t",
        "3x8x9x6-channels_last_chunk-channels_last",
        "3x6x4x5-offset",
        "1x1x25x41-contiguous",
        "4x4x8x8-chunk-contiguous-std",
        "2x3x9x6-chunk-transposed-patch3",
        "2x2x6x10-channels_last-offset-std-patch2",
        "1x6x24x16-chunk-contiguous-patch2",
    ],
    "sde_step": [
        "0x4x8x8-contiguous-torch.float64",
        "3x1x1x2-contiguous-torch.float32",
        "2x5x1x1-contiguous-torch.float64-guided",
        "1x3x5x7-transposed-torch.float64-guided",
        "2x7x1x13-chunk-channels_last-torch.float64-last",
        "3x8x9x6-channels_last_chunk-channels_last-torch.float32-guided",
        "4x4x8x8-chunk-torch.float64",
        "4x4x8x8-chunk-torch.float32-guided-last",
        "2x16x16x16-channels_last_chunk-offset-torch.float64-last",
        "1x1x25x41-contiguous-torch.float64",
    ],
}


def dtypes_of(op: str) -> tuple[str, ...]:
    """The dtypes of an op's chosen cases."""
    return (*DTYPES, "torch.float16") if op in WITH_FLOAT16 else DTYPES
