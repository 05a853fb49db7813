"""Who may call: tokens, how much each may take, and the files of TLS."""
