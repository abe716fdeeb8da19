"""The programs that show fused_ce at work: `python -m bench.demo` trains real models with it, and
`python -m bench` measures it beside stock PyTorch."""
