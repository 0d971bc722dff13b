"""The `mindspeed-serve` command."""


def main() -> None:
    raise SystemExit(0)
