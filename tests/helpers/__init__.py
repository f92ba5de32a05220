"""What several test files share: models, data sets, studies, servers and browsers."""
