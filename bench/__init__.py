"""The programs that show fused_ce at work: `python -m bench.demo` trains real models with it."""
