"""``python -m benchmarks.prior_selection`` is ``python -m benchmarks.prior_selection.run``."""

from benchmarks.prior_selection.run import main

if __name__ == "__main__":
    main()
