"""What is measured: every metric in one table, the recorder that counts, the exporter that renders. Imports only core."""
