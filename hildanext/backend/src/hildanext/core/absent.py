"""What is not in this version yet, by the name it will have: a verb of the command line and a kind of job."""

ABSENT: dict[str, str] = {
    "rl": "reinforcement learning (stage 2)",
}
