"""Parts of quantize.py, which measures the quantization engines side by side."""
