"""The `mindspeed-eval` command."""


def main() -> None:
    raise SystemExit(0)
