"""Every model class of transformers and diffusers, attached once.

``python -m tests.sweep --help`` tells how to run it.
"""
