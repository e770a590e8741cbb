"""What older versions of the packages lack, made good in this one place.

The suite is pinned to the versions of requirements.txt and runs on machines that have older ones, down to PyTorch 2.11,
transformers 5.17 and huggingface_hub 1.33: `benchmarks/gpu_check` is made for them.
"""
