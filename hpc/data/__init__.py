"""Each client's private text: tasks, records, partition over clients, batches and scores."""
