//! All tests, in one program. They run in parallel, each on a database of its own, cloned from one template.

mod adoption;
mod architecture;
mod capture;
mod chaos;
mod commands;
mod contract;
mod docs;
mod failover;
mod guard;
mod hostile;
mod input;
mod keys;
mod load;
mod maintenance;
mod migrations;
mod outage;
mod owners;
mod planted;
mod problems;
mod restore;
mod roles;
mod rollout;
mod start;
mod support;
mod truth;
mod views;
