"""Starting, watching and resuming trainings. May import `pipeline` and `data_tools`; nothing imports it."""
