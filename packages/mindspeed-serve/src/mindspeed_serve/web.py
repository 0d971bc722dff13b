"""The chat page: a conversation on the left, the sampling controls in a sidebar, everything served from this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import gradio as gr

from mindspeed_core.cli import console
from mindspeed_core.errors import InputError
from mindspeed_core.generate.sampling import SamplingConfig
from mindspeed_core.precision import dtype_name
from mindspeed_serve.address import check_free
from mindspeed_serve.assistant import Assistant

FONTS = [
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Noto Sans",
    "sans-serif",
]  # whatever the machine has: none is fetched
EVERY = 0.05  # seconds between two states of an answer: drawing each word would leave a browser no time for its buttons
MONO = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
CSS = """
.gradio-container > main { width: 100%; max-width: 78rem !important; margin: 0 auto; padding: 1rem 1.25rem !important; }
#name h1 { font-size: 1.3rem; margin: 0; }
#name p { color: var(--body-text-color-subdued); margin: 0.15rem 0 0; font-size: 0.9rem; }
#chat { order: 1; }
#controls { order: 2; }
#controls .block { padding-block: 0.6rem; }
#chat button { white-space: nowrap; }
#chat .placeholder { text-align: center; }
#chat [data-testid="status-tracker"] { display: none !important; } /* it would cover the stop button */
"""


def serve(
    assistant: Assistant, sampling: SamplingConfig, *, system: str = "", host: str = "127.0.0.1", port: int = 7860
) -> None:
    """Serve the page until Ctrl-C; its address goes to stdout once it answers."""
    check_free(host, port)
    page = build(assistant, sampling, system=system)
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=MONO)
    _app, url, _share = page.launch(
        server_name=host,
        server_port=port or None,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        ssr_mode=False,
        theme=theme,
        css=CSS,
    )
    print(url, flush=True)
    console.print("the page is ready; Ctrl-C ends it", style="dim")
    threading.Event().wait()


def build(assistant: Assistant, sampling: SamplingConfig, *, system: str = "") -> gr.Blocks:
    """Return the page, with `sampling` as what its controls show first."""
    limit = assistant.engine.max_positions
    with gr.Blocks(
        title=f"{assistant.name} · mindspeed", analytics_enabled=False, fill_height=True, fill_width=True
    ) as page:
        gr.Markdown(f"# {assistant.name}\n{_hint(assistant)}", elem_id="name")
        with gr.Row(equal_height=False):
            # ChatInterface wants its inputs to be on the page before it; the style sheet puts them on its right
            with gr.Column(scale=2, min_width=240, elem_id="controls"), gr.Group():
                system_prompt = gr.Textbox(system, label="System prompt", lines=3, placeholder="none")
                temperature = gr.Slider(
                    0, 2, sampling.temperature, step=0.05, label="Temperature", info="0: the likeliest token"
                )
                top_p = gr.Slider(0.05, 1, sampling.top_p, step=0.05, label="Top-p", info="1: off")
                top_k = gr.Slider(0, 200, sampling.top_k, step=1, label="Top-k", info="0: off")
                length = gr.Slider(1, limit, min(sampling.max_new_tokens, limit), step=1, label="Max new tokens")
            with gr.Column(scale=7, min_width=320, elem_id="chat"):
                gr.ChatInterface(
                    _answering(assistant, sampling.seed),
                    additional_inputs=[system_prompt, temperature, top_p, top_k, length],
                    chatbot=gr.Chatbot(
                        show_label=False,
                        height="calc(100vh - 11.5rem)",
                        placeholder=f"**Ask {assistant.name} something**\n\nEnter sends, Shift+Enter begins a new line.",
                        layout="bubble",
                        buttons=["copy"],
                        allow_tags=False,  # what a model writes is text, never a page
                    ),
                    textbox=gr.Textbox(
                        placeholder="Write a message",
                        show_label=False,
                        container=False,
                        autofocus=True,
                        submit_btn=True,
                        stop_btn=True,
                    ),
                    save_history=True,  # in the browser
                    show_progress="hidden",
                    cache_examples=False,
                    analytics_enabled=False,
                    api_visibility="private",
                    concurrency_limit=1,  # the engine answers one at a time
                )
    return page


def _hint(assistant: Assistant) -> str:
    weight = next(assistant.engine.model.parameters())
    dtype = dtype_name(weight.dtype)
    return (
        f"{dtype} on {weight.device.type}, reads {assistant.engine.max_positions:,} tokens. "
        "Chats are kept in this browser and nowhere else."
    )


def _answering(assistant: Assistant, seed: int | None) -> Any:
    """Return the function behind the page: (message, history, system, sampling...) -> the answer so far, again and again."""
    # A stopped answer may still be in a step on one thread when the next one begins on another
    turn = threading.RLock()

    def answer(
        message: str,
        history: list[dict[str, Any]],
        system: str,
        temperature: float,
        top_p: float,
        top_k: float,
        length: float,
    ) -> Iterator[str]:
        messages = [
            *({"role": m["role"], "content": _text(m["content"])} for m in history),
            {"role": "user", "content": message},
        ]
        pieces: Generator[str, None, None] | None = None
        text = shown = ""
        drawn = float("-inf")
        try:
            with turn:
                sampling = SamplingConfig(
                    temperature=temperature, top_p=top_p, top_k=int(top_k), max_new_tokens=int(length), seed=seed
                )
                pieces = assistant.reply(messages, sampling, system=system.strip() or None)
            while (piece := _next(pieces, turn)) is not None:
                text += piece
                if time.monotonic() - drawn >= EVERY:
                    yield text
                    shown, drawn = text, time.monotonic()
            if text != shown:
                yield text
        except InputError as error:
            raise gr.Error(str(error), title="This cannot be answered", print_exception=False) from error
        finally:
            if pieces is not None:
                with turn:
                    pieces.close()

    return answer


def _next(pieces: Any, turn: Any) -> str | None:
    with turn:
        return next(pieces, None)


def _text(content: Any) -> str:
    """Return the text of a message as the page keeps it: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] if isinstance(part, dict) else str(part) for part in content)
