"""Process groups, collectives and sharding for models that span devices."""
