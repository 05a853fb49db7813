"""`python -m workers`: one rank of a worker group. See protos/process.proto."""

from workers.process.worker import main

if __name__ == "__main__":
    main()
