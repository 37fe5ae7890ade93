"""What is learned: tasks, their records, and how records spread over clients."""
