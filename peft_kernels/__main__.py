"""`python -m peft_kernels`: what is installed here and which kernel runs each op."""

from ._core.report import report

print(report())
