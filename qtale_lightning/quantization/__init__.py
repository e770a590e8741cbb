"""Post-training weight quantization: round-to-nearest (`rtn`) and AWQ (`awq`).

The stages are separate: search (measures the model, changes nothing), apply (rewrites its weights).
"""
