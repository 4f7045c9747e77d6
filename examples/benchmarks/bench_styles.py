"""Mixes of style LoRAs on a small Flux, by every way: trains it and the LoRAs, asks every study, writes
RESULTS-STYLES.md and examples/flux_styles.png.

    python examples/benchmarks/bench_styles.py [--quick | --digits] [--report] [--anew] [--processes N] [--workdir DIR]
        [--out FILE] [--picture FILE]

Run it again and it goes on where it was, and from the answers in answers/ unless --anew; --report writes what is
answered so far. --quick trains hardly anything. --digits asks the main rows with scikit-learn's digits in the place of
shapes, and writes RESULTS-STYLES-DIGITS.md.
"""

from style_mixing.command import main

if __name__ == "__main__":
    main()
