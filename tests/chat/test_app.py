from __future__ import annotations

import socket

import gradio as gr
import pytest

from core_rerank_integrations.chat.app import launch
from core_rerank_integrations.errors import InvalidInputError


def test_error_names_an_address_in_use() -> None:
    with gr.Blocks() as app, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(InvalidInputError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            launch(app, "127.0.0.1", port, opens=False)
