"""What a JSON text may grow to in memory, known before it is parsed. Free of torch."""

MOST_SENT = 200_000, 2_000_000  # lists and objects, and items, of what a visitor sends


def check_structure(raw: bytes, most_containers: int, most_items: int) -> None:
    """Raise `ValueError` for JSON whose lists and objects would take far more memory than itself.

    An empty list takes 3 bytes of a text and 60 of memory. Signs inside texts are counted too, so
    the limits are generous.
    """
    if raw.count(b"{") + raw.count(b"[") > most_containers or raw.count(b",") > most_items:
        raise ValueError(f"more than {most_containers} lists and objects or {most_items} items")
