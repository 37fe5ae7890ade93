"""What is learnt: tasks, their records, and how records spread over clients."""
