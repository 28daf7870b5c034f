"""What `bench/gpu.sh` runs on a machine with a GPU, a stage each: `card`, the kernels' tests (`pytest_rows`), `head`,
`trainer`, `profile`; and `table`, which makes tables of what they wrote.

On a CPU (`bench/gpu.sh --dry-run`) the same code runs with tiny shapes, so that nothing is first tried on a card.
"""
