"""The foundation that every wing may import: types, errors, configuration, log, transport. Imports nothing else of Penstock."""
