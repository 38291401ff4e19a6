export PYTHONPATH=/tmp/perf/src
