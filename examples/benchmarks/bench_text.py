"""The papers' tables on real weights and real tasks: fine-tunes all-MiniLM-L6-v2, asks every study, writes RESULTS.md.

    python examples/benchmarks/bench_text.py [--quick | --all] [--processes N] [--workdir DIR] [--tasks FILE]
        [--out FILE]

It takes 156 minutes of one core, shared by one process per core; run it again and it goes on where it was. --quick asks
the main claims only, of less data (25 minutes); --all every method over every kind of vectors (332). The results say
what a run took. The tasks are read from tasks.json.gz in the directory that TVBASES_DATA names (or in data/ beside the
repository), else from the Hub.
"""

from text.command import main

if __name__ == "__main__":
    main()
