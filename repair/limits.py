"""What each step may have in memory at once: the steps keep to it, `needs` counts with it."""

ANSWER_TOKENS = 16_384  # of one batch of answers: rows times tokens
SCORING_TOKENS = 2_048  # of one scoring pass on a CPU: what it makes stays in the cache
SCORING_ELEMENTS = 1 << 25  # logits of one scoring batch on a CPU: 128 MiB as float32
SCORING_ELEMENTS_ON_GPU = 1 << 27  # where a small batch would waste the device
PATCHING_TOKENS = 2_048  # rows times tokens of the unpatched runs; more gains nothing
PATCHING_KEPT = 1 << 30  # of main memory for what both unpatched runs keep of every module
PREFIX_KEPT = 2 << 30  # on a CPU; on a GPU a third of what is free
FACTORS_KEPT = 2 << 30  # full factors of the shortlist as they are formed, and again whitenings
FORMED_BYTES, GRADIENT_BYTES = 4, 8  # of one number of the factors, and of the trigger's gradient
ROOT_BYTES = 8  # of one number of a factor's root
FACTOR_BYTES = 4 + 8 + ROOT_BYTES  # of one that is whitened: itself, as float64, its root
FISHER_TOKENS = 512  # of one pass on a CPU: what a pass keeps then fits memory that is reused
TEXT_SHARE = 0.5  # plain texts that a repair may not touch either, to one clean answer
TRAINING_TOKENS = 2_048  # of one pass: shorter passes pad less


def formed_bytes(d_in: int, d_out: int) -> int:
    """Return the memory of a module's factors and its trigger gradient, as they are formed."""
    return (d_in**2 + d_out**2) * FORMED_BYTES + d_in * d_out * GRADIENT_BYTES


def whitened_bytes(d_in: int, d_out: int) -> int:
    """Return the memory of a module's factors while they are whitened."""
    return (d_in**2 + d_out**2) * FACTOR_BYTES


def root_bytes(d_in: int, d_out: int) -> int:
    """Return the memory of a module's roots: what is kept of it."""
    return (d_in**2 + d_out**2) * ROOT_BYTES
