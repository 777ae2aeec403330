"""Everything that measures: speed, memory and exactness of gpsa_kernels beside what a user could do instead.

docs/benchmarks.md tells how to read and repeat it; ``python -m benchmarks`` runs it.
"""
