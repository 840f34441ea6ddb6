"""One base model, many adapters, and a gate that knows when to prompt, retrieve, fine-tune, mix or confer.

`import hybrid` is light: torch, vLLM and Gradio load only where they are used.
"""

__version__ = "0.1.0"
