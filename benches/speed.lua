-- The requests of one row of the table, for wrk, and what became of them: requests a second, median and 99th percentile in
-- microseconds, answers with an error, requests without an answer.

local body = '{"name": "Loft", "postal_address": {"street_address": "1 rue Oberkampf", "postal_code": "75011", "city": "Paris", '
    .. '"country": "FR"}, "description": "' .. string.rep("Nice. ", 40) .. '", "building_type": "HOUSE", '
    .. '"latest_price_eur": %d, "surface_area_m2": 42.5, "rooms_count": 2, "bedrooms_count": 1, '
    .. '"contact_phone_number": "+33123456789"}'
-- With a key where there is one.
local key = os.getenv("KEY")
local headers = { ["Content-Type"] = "application/json", ["Authorization"] = key and "Bearer " .. key }

local function get(path)
    return wrk.format("GET", path)
end

local function put(id, price)
    return wrk.format("PUT", "/listings/" .. id, headers, body:format(price))
end

local rows = {
    history = function() return get("/listings/" .. math.random(500000) .. "/prices") end,
    listing = function() return get("/listings/" .. math.random(500000)) end,
    hot = function() return get("/listings/4711") end,
    unknown = function() return get("/listings/" .. 500000000 + math.random(500000)) end,
    common = function() return get("/listings?city=Paris&limit=100&after=" .. math.random(400000)) end,
    rare = function() return get("/listings?city=Town%20" .. math.random(600) .. "&limit=100") end,
    keep = function() local id = math.random(400001, 500000) return put(id, 100000 + id) end,
    reprice = function() return put(math.random(400001, 500000), math.random(1000000, 9000000)) end,
    create = function() return wrk.format("POST", "/listings", headers, body:format(math.random(1000000))) end,
}

local requests, next = {}, 0

local threads = 0
function setup(thread)
    thread:set("number", threads)
    threads = threads + 1
end

-- Made beforehand, so that making them costs nothing while time is taken, and so many that hardly one comes twice.
function init(arguments)
    math.randomseed(os.time() * 100 + number)
    for n = 1, 100000 do
        requests[n] = rows[arguments[1]]()
    end
end

function request()
    next = next % #requests + 1
    return requests[next]
end

function done(summary, latency)
    local errors = summary.errors
    print(("result %d %d %d %d %d"):format(summary.requests / summary.duration * 1e6, latency:percentile(50),
        latency:percentile(99), errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
