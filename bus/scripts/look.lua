-- use: _view
-- Every known node of some models. KEYS late. ARGV prefix, models.
-- Answers {now, when the first held-back job is due, nodes...}.
local prefix = ARGV[1]
local first = call('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
local answer, seen = {now, tonumber(first[2] or 0)}, {}
for i = 2, #ARGV do
  for _, id in ipairs(call('ZRANGE', prefix .. 'model:' .. ARGV[i], 0, -1)) do
    if not seen[id] then
      seen[id] = true
      answer[#answer + 1] = view(prefix, id, SHORT)
    end
  end
end
return answer
